"""A cache that beams share against one that is copied."""

import pytest
import torch

from fairseq.generation.steps.beam_cache import BeamCache
from fairseq.modules.multihead_attention import IncrementalState, MultiheadAttention


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("begun", [1, 3])
def test_reordered_beams_attend_as_with_copies(heads, begun):
    torch.manual_seed(0)
    layers = [MultiheadAttention(24, heads) for _ in range(2)]
    for layer in layers:
        layer.reset_parameters()
    states, rows = (IncrementalState(), BeamCache()), 3
    orders = ([0, 0, 1, 1, 2, 2], [5, 0, 0, 3, 3, 1], [0, 1, 2, 3, 4, 5], [4, 4, 2, 1], [3], [0], [0, 0])
    with torch.inference_mode():
        for step, order in enumerate(orders):
            x_BTC = torch.randn(rows, begun if step == 0 else 1, 24)
            for number, layer in enumerate(layers):
                plain, own = (layer(x_BTC, is_causal=True, incremental_state=s, name=str(number)) for s in states)
                torch.testing.assert_close(own, plain)
            for state in states:
                state.advance(torch.ones(x_BTC.shape[:2], dtype=torch.bool))
                state.reorder(torch.tensor(order))
            rows = len(order)
        later = torch.randn(rows, 2, 24)  # several tokens at once, after others
        plain, own = (layers[0](later, is_causal=True, incremental_state=s, name="0") for s in states)
        torch.testing.assert_close(own, plain)


def test_keys_are_written_once():
    cache, rows = BeamCache(), torch.randn(4, 1, 8)
    with torch.inference_mode():
        for _ in range(3):
            cache.attend("0", rows, rows, rows, 2)
            cache.reorder(torch.tensor([3, 3, 0, 0]))
    assert cache._kept["0"][2] == 12
    assert cache._token_RT.tolist() == [[3, 4, 11], [3, 4, 11], [0, 7, 8], [0, 7, 8]]


def test_texts_that_end_before_the_first_step_leave_the_others():
    cache, rows = BeamCache(), torch.randn(2, 1, 8)
    with torch.inference_mode():
        cache.reorder(torch.tensor([1, 3]))
        cache.attend("0", rows, rows, rows, 2)
    assert cache._token_RT.tolist() == [[0], [1]]


def test_rows_are_the_same_on_any_number_of_threads():
    torch.manual_seed(0)
    rows, before, found = torch.randn(9, 1, 24), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = BeamCache()
            with torch.inference_mode():
                cache.attend("0", rows, rows, rows, 2)
                found.append(cache.attend("0", rows + 1, rows.flip(0), rows * 2, 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])

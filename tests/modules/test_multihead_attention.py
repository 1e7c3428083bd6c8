"""Attention against the formula written out, and step by step against all at once."""

import math

import pytest
import torch

from fairseq.modules.multihead_attention import Encoded, IncrementalState, MultiheadAttention


def by_hand(attention, query_BTC, source_BSC, allowed_TS):
    heads = []
    width = query_BTC.shape[2] // attention.num_heads
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (
            p(x)[:, :, part]
            for p, x in (
                (attention.q_proj, query_BTC),
                (attention.k_proj, source_BSC),
                (attention.v_proj, source_BSC),
            )
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        heads.append(scores.masked_fill(~allowed_TS, -math.inf).softmax(2) @ v)
    return attention.out_proj(torch.cat(heads, 2))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    made = MultiheadAttention(12, 3).double()
    made.reset_parameters()
    return made


def test_causal_attention_is_the_published_formula(attention):
    x = torch.randn(2, 5, 12, dtype=torch.double)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, is_causal=True), by_hand(attention, x, x, allowed))


def test_masked_attention_to_a_source_of_another_width():
    torch.manual_seed(1)
    attention = MultiheadAttention(8, 2, key_width=6).double()
    attention.reset_parameters()
    query, source = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(2, 4, 6, dtype=torch.double)
    visible = torch.tensor([[True, True, True, False], [True, True, False, False]])
    expected = by_hand(attention, query, source, visible[:, None].expand(2, 3, 4))
    torch.testing.assert_close(attention.to_source(query, Encoded(source, visible)), expected)


def test_rows_of_one_source_share_its_keys():
    torch.manual_seed(2)
    attention = MultiheadAttention(8, 2).double()
    attention.reset_parameters()
    query, source = torch.randn(6, 1, 8, dtype=torch.double), torch.randn(2, 4, 8, dtype=torch.double)
    everything = torch.ones(6, 1, 4, dtype=torch.bool)
    expected = by_hand(attention, query, source.repeat_interleave(3, 0), everything)
    state = IncrementalState()
    for _ in range(2):  # the second time from the cache
        torch.testing.assert_close(attention.to_source(query, Encoded(source, None), state, "0"), expected)
    state.reorder(torch.tensor([3, 3, 4]), sentences=torch.tensor([1]))
    torch.testing.assert_close(attention.to_source(query[3:], Encoded(source[1:], None), state, "0"), expected[3:])


def test_steps_of_any_size_equal_one_pass(attention):
    x = torch.randn(2, 7, 12, dtype=torch.double)
    state = IncrementalState()
    parts = [attention(part, is_causal=True, incremental_state=state, name="0") for part in x.split([1, 3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, is_causal=True))


def test_reordered_rows_go_on_from_the_rows_they_were_taken_from(attention):
    x = torch.randn(3, 4, 12, dtype=torch.double)
    order = torch.tensor([2, 2, 0])
    state = IncrementalState()
    attention(x[:, :3], is_causal=True, incremental_state=state, name="0")
    state.reorder(order)
    last = attention(x[order, 3:], is_causal=True, incremental_state=state, name="0")
    torch.testing.assert_close(last, attention(x[order], is_causal=True)[:, 3:])


@pytest.mark.parametrize("beam", [1, 4])
def test_decoding_steps_with_many_keys_equal_the_fused_attention(beam):
    """18 tokens and a source of 20 in float32 without gradients: products of decoding steps, and the cache's room."""
    torch.manual_seed(3)
    attention = MultiheadAttention(16, 2)
    attention.reset_parameters()
    x, source = torch.randn(2 * beam, 18, 16), torch.randn(2, 20, 16)
    encoded = Encoded(source, torch.arange(20) < torch.tensor([[20], [17]]))
    rows = Encoded(source.repeat_interleave(beam, 0), encoded.visible_BS.repeat_interleave(beam, 0))
    state, own, of_source = IncrementalState(), [], []
    with torch.inference_mode():
        for step in range(18):
            part = x[:, step : step + 1]
            own.append(attention(part, is_causal=True, incremental_state=state, name="0"))
            of_source.append(attention.to_source(part, encoded, state, "1"))
    torch.testing.assert_close(torch.cat(own, 1), attention(x, is_causal=True))
    torch.testing.assert_close(torch.cat(of_source, 1), attention.to_source(x, rows))


def test_rows_that_continue_themselves_are_not_copied(attention):
    x, state = torch.randn(2, 2, 12, dtype=torch.double), IncrementalState()
    with torch.inference_mode():
        attention(x, is_causal=True, incremental_state=state, name="0")
        state.advance(torch.ones(2, 2, dtype=torch.bool))
        before = state._cache["0"][0]
        state.reorder(torch.tensor([0, 1]))
        assert state._cache["0"][0] is before
        state.reorder(torch.tensor([0]))
        assert len(state._cache["0"][0]) == 1


def test_initial_weights_treat_the_three_inputs_as_one_matrix():
    torch.manual_seed(0)
    attention = MultiheadAttention(256, 4)
    attention.reset_parameters()
    bound = math.sqrt(6 / (256 + 256)) / math.sqrt(2)
    assert attention.q_proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert attention.out_proj.weight.abs().max().item() == pytest.approx(bound * math.sqrt(2), rel=1e-3)
    assert not attention.out_proj.bias.any()
    for projection in (
        attention.k_proj,
        attention.v_proj,
        attention.q_proj,
    ):  # fairseq leaves these as torch draws them
        assert projection.bias.abs().max().item() == pytest.approx(256**-0.5, rel=0.05)

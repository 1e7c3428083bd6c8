import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.token_block_dataset import BREAK_MODES, TokenBlockDataset

SIZES = st.lists(st.integers(1, 7), max_size=30)


def dataset(sizes, block_size, mode):
    return TokenBlockDataset(np.arange(sum(sizes)), np.array(sizes, dtype=np.int32), block_size, mode)


def packed_one_by_one(sizes, block_size, mode):
    """The break modes as they are described, sentence by sentence."""
    if mode == "none":
        stream = list(range(sum(sizes)))
        return [stream[i : i + block_size] for i in range(0, len(stream), block_size)]
    blocks, current, position = [], [], 0
    for size in sizes:
        sentence = list(range(position, position + size))
        position += size
        separator = mode == "complete_doc" and size == 1
        if current and (mode == "eos" or separator or len(current) + size > block_size):
            blocks.append(current)
            current = []
        current += [] if separator else sentence
    return [*blocks, current] if current else blocks


@given(SIZES, st.integers(1, 12), st.sampled_from(BREAK_MODES))
def test_blocks_are_as_described(sizes, block_size, mode):
    blocks = dataset(sizes, block_size, mode)
    assert [block.tolist() for block in blocks] == packed_one_by_one(sizes, block_size, mode)
    assert blocks.sizes.tolist() == [len(block) for block in blocks]


def test_examples():
    sizes = [3, 1, 2, 9, 1, 1, 4]
    assert dataset(sizes, 6, "none").sizes.tolist() == [6, 6, 6, 3]
    assert dataset(sizes, 6, "complete").sizes.tolist() == [6, 9, 6]
    assert dataset(sizes, 6, "complete_doc").sizes.tolist() == [3, 2, 9, 4]
    assert dataset(sizes, None, "eos").sizes.tolist() == sizes


def test_blocks_are_int64_whatever_the_file_holds():
    block = TokenBlockDataset(np.array([65535, 2], dtype=np.uint16), np.array([2]), 5, "none")[0]
    assert block.dtype == np.int64
    assert block.tolist() == [65535, 2]


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(IndexError, match="block 1 of 1"):
        dataset([2], 4, "none")[1]


@given(SIZES, st.integers(1, 9), st.integers(1, 9), st.sampled_from(BREAK_MODES))
def test_split_cuts_long_blocks_and_keeps_the_text(sizes, block_size, longest, mode):
    blocks = dataset(sizes, block_size, mode)
    expected = [block[i : i + longest].tolist() for block in blocks for i in range(0, len(block), longest)]
    assert [block.tolist() for block in blocks.split(longest)] == expected


@given(SIZES, st.integers(1, 9), st.integers(1, 9), st.sampled_from(BREAK_MODES))
def test_documents_begin_where_the_mode_says(sizes, block_size, longest, mode):
    unbroken = {"complete_doc": sum(sizes) + 1, "none": sum(sizes) + 1}.get(mode, block_size)
    expected = [document[0] for document in packed_one_by_one(sizes, unbroken, mode)] or [0] * (mode == "none")
    blocks = dataset(sizes, block_size, mode)
    assert blocks.document_starts().tolist() == expected
    assert blocks.split(longest).document_starts().tolist() == expected


@pytest.mark.parametrize(
    ("block_size", "mode", "message"),
    [
        (4, "lines", "unknown --sample-break-mode 'lines'; choose one of none"),
        (0, "none", "got 0"),
        (None, "complete", "None"),
    ],
)
def test_settings_that_make_no_sense(block_size, mode, message):
    with pytest.raises(ValueError, match=message):
        dataset([1], block_size, mode)


def test_sizes_that_do_not_fit_the_stream():
    with pytest.raises(ValueError, match="sentences of 3 tokens in a stream of 4"):
        TokenBlockDataset(np.zeros(4, np.int64), np.array([1, 2]), 4)


@pytest.mark.parametrize(("mode", "run"), [("complete", "plain_vanilla_valid"), ("none", "plain_vanilla_none")])
def test_blocks_of_a_recorded_evaluation(mode, run):
    golden = os.environ.get("FAIRSEQ_GOLDEN")
    if not golden:
        pytest.skip("FAIRSEQ_GOLDEN names no folder with recorded runs")
    torch = pytest.importorskip("torch")
    recorded = torch.load(os.path.join(golden, "trime", "scores", f"{run}.pt"), weights_only=True)
    text = MMapIndexedDataset(os.path.join(golden, "trime", "data-bin", "wt2s", "valid"))
    blocks = TokenBlockDataset(text.tokens, text.sizes, 64, mode)
    kept = [block for block in blocks if len(block) <= 256]
    assert [len(block) for block in kept] == list(recorded["lengths"])
    assert np.array_equal(np.concatenate(kept), recorded["tokens"].numpy())

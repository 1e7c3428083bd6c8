import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset

PAD, EOS = 1, 2


def text_of(sizes, break_mode="eos"):
    tokens = np.arange(100, 100 + sum(sizes))
    return MonolingualDataset(TokenBlockDataset(tokens, np.array(sizes), 5, break_mode), PAD, EOS)


def rows_in_order(data, kept, context_window, max_len):
    """Walk through the kept blocks and carry the tokens read last from row to row."""
    before: list[int] = []
    for i in kept:
        source = data.source(i).tolist()
        room = max(0, min(context_window, max_len - len(source)))
        context = before[len(before) - min(room, len(before)) :]
        yield context, source, data.target(i).tolist()
        before = before + source


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=25),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from(["eos", "none", "complete_doc"]),
)
def test_rows_are_those_of_a_walk_through_the_kept_blocks(sizes, context_window, longest, room, mode):
    data = text_of(sizes, mode)
    kept = [i for i in range(len(data)) if data.sizes[i] <= longest]
    max_len = longest + room
    windows = LMContextWindowDataset(data, kept, context_window, max_len)
    expected = dict(zip(kept, rows_in_order(data, kept, context_window, max_len)))
    for i in reversed(kept):  # any order
        context, source, target = expected[i]
        batch = windows.collate([i])
        assert batch.ids_B.tolist() == [i]
        assert batch.tokens_BT[0].tolist() == context + source
        assert batch.target_BT[0].tolist() == [PAD] * len(context) + target
        assert batch.scored_BT[0].tolist() == [False] * len(context) + [True] * len(source)
        assert len(context) + len(source) <= max_len
    if kept:
        together = windows.collate(kept)
        assert together.num_scored == data.sizes[kept].sum()
        assert together.target_BT[together.scored_BT].tolist() == [t for i in kept for t in data.target(i)]


def test_example():
    data = text_of([3, 8, 3, 2])
    windows = LMContextWindowDataset(data, [0, 2, 3], context_window=4, max_len=5)
    batch = windows.collate([0, 3])
    # block 3 reads (110 111 112 | 113 114 shifted by one): block 2's last sources 111 112, then 113
    assert batch.tokens_BT.tolist() == [[EOS, 100, 101, PAD, PAD], [110, 111, 112, 113, 114]]
    assert batch.target_BT.tolist() == [[100, 101, 102, PAD, PAD], [PAD, PAD, PAD, 114, 115]]
    assert windows.collate([2]).tokens_BT.tolist() == [[100, 101, 110, 111, 112]]


def test_a_block_that_was_left_out_cannot_be_asked_for():
    windows = LMContextWindowDataset(text_of([3, 8, 3]), [0, 2], 4, 8)
    with pytest.raises(IndexError, match="block 1 is not among the 2 kept"):
        windows.collate([1])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 6))
def test_blocks_that_begin_with_bos_keep_it_within_the_context(sizes, window, more):
    """Step by step, as a reader of rows would: the text so far ends the context, and <s> comes before each block."""
    plain = text_of(sizes)
    data = MonolingualDataset(plain.blocks, PAD, EOS, bos=0)
    longest = max(sizes) + window + more - 3
    windows = LMContextWindowDataset(data, range(len(sizes)), window, longest)
    so_far = []
    for i, size in enumerate(sizes):
        row = [0, *data.source(i).tolist()]
        room = longest - len(row)
        context = so_far[-min(window, room) :] if min(window, room) > 0 else []
        batch = windows.collate([i])
        assert batch.tokens_BT[0].tolist() == context + row
        assert batch.target_BT[0][batch.scored_BT[0]].tolist() == data.target(i).tolist()
        assert batch.scored_BT[0].tolist() == [False] * (len(context) + 1) + [True] * size
        so_far += row


def test_begin_of_sentence_without_context():
    data = text_of([3, 3])
    with_bos = MonolingualDataset(data.blocks, PAD, EOS, bos=0)
    assert LMContextWindowDataset(with_bos, [0, 1], 0, 8).collate([1]).tokens_BT.tolist() == [[0, 102, 103, 104]]

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.batching import batch_by_size, filter_by_size

LENGTHS = st.lists(st.integers(1, 20), max_size=60)
LIMIT = st.none() | st.integers(20, 60)
COUNT = st.none() | st.integers(1, 10)


def one_by_one(lengths, max_tokens, max_sentences, multiple):
    """Fill a batch item by item; when full, cut it and carry the part over the multiple on."""
    batches, batch = [], []
    for i, length in enumerate(lengths):
        while batch:
            cost = (len(batch) + 1) * max(length, *(lengths[j] for j in batch))
            if not (len(batch) == max_sentences or (max_tokens is not None and cost > max_tokens)):
                break
            size = multiple * (len(batch) // multiple) or len(batch)
            batches.append(batch[:size])
            batch = batch[size:]
        batch.append(i)
    return [*batches, batch] if batch else batches


@given(LENGTHS, LIMIT, COUNT, st.integers(1, 9))
def test_batches_are_cut_as_described(lengths, max_tokens, max_sentences, multiple):
    if max_tokens is None and max_sentences is None:
        max_sentences = 4
    indices = np.arange(len(lengths)) + 3  # block numbers are not places in the order
    sizes = np.concatenate([[99, 99, 99], np.array(lengths, dtype=np.int64)])
    batches = batch_by_size(indices, sizes, max_tokens, max_sentences, multiple)
    expected = one_by_one(lengths, max_tokens, max_sentences, multiple)
    assert [(batch - 3).tolist() for batch in batches] == expected
    for batch in batches:
        assert max_tokens is None or len(batch) * sizes[batch].max() <= max_tokens
        assert max_sentences is None or len(batch) <= max_sentences


def test_examples():
    sizes = np.full(20, 10)
    count = lambda *limits: [len(batch) for batch in batch_by_size(np.arange(20), sizes, *limits)]  # noqa: E731
    assert count(110, None, 8) == [8, 8, 4]
    assert count(70, None, 8) == [7, 7, 6]
    assert count(110, None, 1) == [11, 9]
    assert count(None, 9, 4) == [8, 8, 4]
    assert count(40, 9, 1) == [4, 4, 4, 4, 4]


def test_a_block_over_the_limit_is_named():
    with pytest.raises(ValueError, match="block 7 has 31 tokens, more than --max-tokens 30"):
        batch_by_size(np.array([5, 7]), np.array([0] * 5 + [3, 0, 31]), max_tokens=30)


def test_some_limit_is_needed():
    with pytest.raises(ValueError, match="give --max-tokens or --max-sentences"):
        batch_by_size(np.arange(3), np.ones(3, np.int64))
    with pytest.raises(ValueError, match="--max-sentences must be at least 1, got 0"):
        batch_by_size(np.arange(3), np.ones(3, np.int64), max_sentences=0)


def test_filtering_keeps_the_order():
    kept, dropped = filter_by_size(np.array([3, 0, 2, 1]), np.array([5, 9, 4, 6]), 5)
    assert (kept.tolist(), dropped.tolist()) == ([0, 2], [3, 1])
    kept, dropped = filter_by_size(np.arange(4), np.array([5, 9, 4, 6]), None)
    assert (kept.tolist(), dropped.tolist()) == ([0, 1, 2, 3], [])

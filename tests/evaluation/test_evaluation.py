"""The shards of a split: together they are the whole, each block in one of them."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fairseq.data.batching import batch_by_size
from fairseq.data.batching_config import DatasetConfig
from fairseq.evaluation.config import EvaluationConfig
from fairseq.evaluation.splits import part_by_length, part_in_order

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=30)
LONGEST = 7


def shards(cut, sizes, count, context, max_tokens):
    sizes = np.array(sizes)
    kept = np.flatnonzero(sizes <= LONGEST)
    data = DatasetConfig(max_tokens=max_tokens)
    return [
        cut(
            kept,
            sizes,
            EvaluationConfig(path="x", num_shards=count, shard_id=shard, context_window=context),
            data,
        )
        for shard in range(count)
    ]


@given(SIZES, st.integers(1, 5), st.integers(LONGEST, 20))
def test_blocks_of_like_length_are_batched_within_a_shard(sizes, count, max_tokens):
    parts = shards(part_by_length, sizes, count, 0, max_tokens)
    blocks = [sorted(np.concatenate([[], *part.batches]).tolist()) for part in parts]
    assert sum(blocks, []) == [block for block, size in enumerate(sizes) if size <= LONGEST]
    assert sum(part.num_blocks for part in parts) == len(sizes)
    assert sum(part.num_total_tokens for part in parts) == sum(sizes)
    for part, numbers in zip(parts, blocks):
        assert part.num_scored_tokens == sum(sizes[int(block)] for block in numbers)


@given(SIZES, st.integers(1, 5), st.integers(0, 30), st.integers(LONGEST, 20))
def test_shards_in_order_take_whole_batches(sizes, count, context, max_tokens):
    kept = np.flatnonzero(np.array(sizes) <= LONGEST)
    assume(len(kept))
    batches = [batch.tolist() for batch in batch_by_size(kept, np.array(sizes), max_tokens)]
    scored = [sum(sizes[block] for block in batch) for batch in batches]
    useful = max(1, sum(sum(scored[: number + 1]) > context for number in range(len(batches))))
    if count > useful:
        with pytest.raises(ValueError, match=f"--num-shards {count} is too many: test makes {useful} batches"):
            shards(part_in_order, sizes, count, context, max_tokens)
        return
    parts = shards(part_in_order, sizes, count, context, max_tokens)
    assert [batch.tolist() for part in parts for batch in part.batches] == batches
    assert sum(part.num_total_tokens for part in parts) == sum(sizes)
    assert sum(part.num_blocks for part in parts) == len(sizes)
    before = 0
    for part in parts:
        assert part.batches
        assert part.num_tokens_before == before
        before += part.num_scored_tokens
        assert part.num_all_scored_tokens == sum(scored)
        # Every part makes a row wherever the whole does.
        assert count == 1 or before > context
    assert len({part.digest for part in parts}) == 1

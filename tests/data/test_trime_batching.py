import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.batching import batch_by_size
from fairseq.data.batching_config import BatchingConfig
from fairseq.data.trime_batching import ranks_together, read_order, training_order


@pytest.fixture
def batch_file(tmp_path):
    def write(content):
        path = tmp_path / "batches.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_any_order_will_do_unless_one_is_asked_for(batch_file):
    assert training_order(BatchingConfig(), 5) is None
    assert training_order(BatchingConfig(keep_order=True), 5).tolist() == [0, 1, 2, 3, 4]
    given_order = BatchingConfig(predefined_batches=batch_file([3, 0, 2, 1]))
    assert training_order(given_order, 4).tolist() == [3, 0, 2, 1]


@given(st.permutations(list(range(11))), st.integers(1, 5))
def test_batches_are_sub_lists_of_the_file(tmp_path_factory, order, blocks_per_batch):
    path = tmp_path_factory.mktemp("order") / "batches.json"
    path.write_text(json.dumps(order), encoding="utf-8")
    sizes = np.full(11, 8)
    sizes[10] = 3  # the last block of a text is shorter
    batches = batch_by_size(read_order(path, 11), sizes, max_tokens=8 * blocks_per_batch)
    wanted = [order[i : i + blocks_per_batch] for i in range(0, 11, blocks_per_batch)]
    assert [batch.tolist() for batch in batches] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0, 1, 2], "holds 3 blocks, the training data has 4"),
        ([0, 1, 2, 3, 4], "holds 5 blocks, the training data has 4"),
        ([], "holds 0 blocks, the training data has 4"),
        ([0, 1, 1, 1], r"holds 1 blocks more than once \(1\) and 2 not at all \(2, 3\)"),
        ([0, 1, 2, 4], "holds block 4; the training data has 0 to 3"),
        ([0, 1, 2, -1], "holds block -1"),
        ([0, 1, 2, 10**30], "which is not a block number"),
        ([0, 1, 2, "3"], '1 items that are not block numbers, such as "3"'),
        ([0, 1, 2, 3.0], "such as 3.0"),
        ([0, 1, 2, True], "such as true"),
        ([[0, 1], [2, 3]], "2 items that are not block numbers"),
        ({"0": [1]}, "a JSON dict, expected a list"),
        ("[0, 1, 2", "is not JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected(batch_file, content, message):
    with pytest.raises(ValueError, match=message):
        read_order(batch_file(content), 4)


@pytest.mark.parametrize(
    ("flags", "max_tokens", "world_size", "together"),
    [
        ({}, 100, 4, 1),
        ({"keep_order": True}, 100, 4, 1),
        ({"keep_order": True}, None, 4, 1),
        ({"keep_order": True, "train_mem_size": 100}, 100, 4, 1),
        ({"keep_order": True, "train_mem_size": 200}, 100, 4, 2),
        ({"keep_order": True, "train_mem_size": 400}, 100, 4, 4),
        ({"predefined_batches": "x"}, 100, 4, 4),
        ({"predefined_batches": "x", "train_mem_size": 200}, 100, 4, 2),
    ],
)
def test_ranks_that_share_a_memory(flags, max_tokens, world_size, together):
    assert ranks_together(BatchingConfig(**flags), max_tokens, world_size) == together


@pytest.mark.parametrize(
    ("memory", "max_tokens", "world_size", "message"),
    [
        (250, 100, 4, "--train-mem-size 250 is not a multiple of --max-tokens 100; give 200"),
        (50, 100, 4, "--train-mem-size 50 is not a multiple of --max-tokens 100; give 100"),
        (300, 100, 4, "shared by 3 processes at a time, which does not divide 4 processes"),
        (300, None, 4, "--train-mem-size 300 is measured in batches of --max-tokens"),
    ],
)
def test_a_memory_that_cannot_be_shared_out(memory, max_tokens, world_size, message):
    with pytest.raises(ValueError, match=message):
        ranks_together(BatchingConfig(keep_order=True, train_mem_size=memory), max_tokens, world_size)


def test_too_few_processes_for_the_memory_are_reported(caplog):
    assert ranks_together(BatchingConfig(keep_order=True, train_mem_size=800), 100, 2) == 2
    assert "spread over 8 processes, this run has 2: its memory holds 200 tokens" in caplog.text
    assert "--max-tokens to 400" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"keep_order": True, "predefined_batches": "x"}, "exclude each other"),
        ({"train_mem_size": 100}, "--keep-order"),
        ({"keep_order": True, "train_mem_size": 0}, "at least 1, got 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        BatchingConfig(**flags)

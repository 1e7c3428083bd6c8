import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.types import LMBatch

BATCHES = st.integers(0, 13)
WORLD = st.integers(1, 4)


def collate(indices):
    ids = torch.from_numpy(np.asarray(indices))
    row = torch.zeros(len(ids), 2, dtype=torch.int64)
    return LMBatch(ids, row, row, row.bool())


def iterator(count, **settings):
    return EpochBatchIterator(collate, [np.array([2 * i, 2 * i + 1]) for i in range(count)], **settings)


def ids_of(batches):
    return [batch.ids_B.tolist() for batch in batches]


@given(BATCHES, WORLD, st.integers(0, 3), st.integers(0, 2))
def test_each_block_comes_once_an_epoch_over_all_ranks(count, world, epochs, workers):
    everyone = [iterator(count, rank=r, world_size=world, num_workers=workers) for r in range(world)]
    for _ in range(epochs):
        for one in everyone:
            one.next_epoch()
    shares = [ids_of(one) for one in everyone]
    assert {len(share) for share in shares} == {len(everyone[0])}
    assert len(everyone[0]) == -(-count // world)
    assert sorted(i for share in shares for ids in share for i in ids) == list(range(2 * count))
    assert all(one.end_of_epoch for one in everyone)


@given(BATCHES, WORLD, st.booleans())
def test_ranks_together_do_what_one_process_does(count, world, shuffle):
    alone = ids_of(iterator(count, seed=7, shuffle=shuffle))
    shares = [ids_of(iterator(count, seed=7, shuffle=shuffle, rank=r, world_size=world)) for r in range(world)]
    steps = [list(filter(None, step)) for step in zip(*shares)]
    assert steps == [alone[i : i + world] for i in range(0, count, world)]


@given(BATCHES, st.integers(0, 30), WORLD, st.integers(0, 2))
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(count, stop, world, workers):
    def run(walker, limit):
        seen = []
        while walker.epoch <= 2 and len(seen) < limit:
            seen += ids_of(itertools.islice(walker, limit - len(seen)))
            if walker.end_of_epoch:
                walker.next_epoch()
        return seen

    for rank in range(world):
        settings = {"seed": 3, "rank": rank, "world_size": world, "num_workers": workers}
        whole = run(iterator(count, **settings), 1000)
        first = iterator(count, **settings)
        seen = run(first, stop)
        second = iterator(count, **settings)
        second.load_state_dict(first.state_dict())
        assert second.batches_done == first.batches_done
        assert seen + run(second, 1000) == whole


@given(st.integers(1, 13), st.integers(0, 4), WORLD, WORLD)
def test_a_run_goes_on_with_another_number_of_ranks(count, steps, before, after):
    first = [iterator(count, rank=r, world_size=before) for r in range(before)]
    seen = [ids for one in first for ids in ids_of(itertools.islice(one, steps))]
    assert len({str(one.state_dict()) for one in first}) == 1
    for rank in range(after):
        second = iterator(count, rank=rank, world_size=after)
        second.load_state_dict(first[0].state_dict())
        seen += ids_of(second)
    assert sorted(i for ids in seen for i in ids) == list(range(2 * count))


@given(BATCHES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_groups_of_batches_stay_together_on_neighbouring_ranks(count, group, groups_per_step, epoch):
    world = group * groups_per_step
    everyone = [iterator(count, rank=r, world_size=world, group=group) for r in range(world)]
    for one in everyone:
        one.epoch = epoch
    shares = [[ids[0] // 2 if ids else None for ids in ids_of(one)] for one in everyone]
    assert sorted(b for share in shares for b in share if b is not None) == list(range(count))
    for step in zip(*shares):
        for first in range(0, world, group):
            members = [batch for batch in step[first : first + group] if batch is not None]
            if members:
                start = members[0]
                assert start % group == 0
                assert members == list(range(start, min(start + group, count)))


def test_groups_are_shuffled_again_each_epoch():
    one, single = iterator(40, group=4), iterator(40)
    first = one.order().tolist()
    one.next_epoch()
    assert first != one.order().tolist()
    assert sorted(first) == sorted(one.order().tolist())
    assert single.order().tolist() == iterator(40, group=1).order().tolist()


@given(st.integers(1, 13), st.integers(0, 4), st.integers(1, 3))
def test_groups_go_on_where_they_stood(count, steps, group):
    settings = {"world_size": group, "group": group, "rank": group - 1}
    whole, first, second = (iterator(count, **settings) for _ in range(3))
    seen = ids_of(itertools.islice(first, steps))
    second.load_state_dict(first.state_dict())
    assert seen + ids_of(second) == ids_of(whole)


def test_another_group_size_is_reported_and_begins_with_a_whole_group(caplog):
    walker = iterator(20, world_size=4, group=4)
    walker.load_state_dict({"epoch": 1, "batches_consumed": 6, "num_batches": 20, "group": 2})
    assert walker.batches_done == 1
    assert "shuffled 2 at a time and are now 4" in caplog.text


def test_order_depends_on_seed_and_epoch():
    one, same, other = iterator(50, seed=1), iterator(50, seed=1), iterator(50, seed=2)
    assert one.order().tolist() == same.order().tolist() != other.order().tolist()
    first = one.order().tolist()
    one.next_epoch()
    assert first != one.order().tolist()
    assert iterator(50, shuffle=False).order().tolist() == list(range(50))


def test_a_batch_counts_as_done_while_it_is_worked_on():
    walker = iterator(5, num_workers=2)
    for done, _ in enumerate(walker, start=1):
        assert walker.batches_done == done
    assert walker.state_dict() == {"epoch": 1, "batches_consumed": 5, "num_batches": 5}


def test_another_number_of_batches_is_met_at_the_same_share(caplog):
    walker = iterator(20)
    walker.load_state_dict({"epoch": 3, "batches_consumed": 5, "num_batches": 10})
    assert (walker.epoch, walker.batches_done) == (3, 10)
    assert "the epoch had 10 batches and now has 20" in caplog.text
    walker.load_state_dict({"epoch": 4, "batches_consumed": 0, "num_batches": 10})
    assert walker.batches_done == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_preparing_a_batch_reaches_the_caller(workers):
    def fails(indices):
        raise ValueError("no such block")

    with pytest.raises(ValueError, match="no such block"):
        list(EpochBatchIterator(fails, [np.array([0])], num_workers=workers))


def test_threads_end_when_the_caller_stops_early():
    before = threading.active_count()
    walker = iter(iterator(100, num_workers=3))
    next(walker)
    walker.close()
    assert threading.active_count() == before

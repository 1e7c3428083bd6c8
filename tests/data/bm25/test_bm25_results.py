import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data.bm25.chain import chain, neighbor_rate, reverse
from fairseq.data.bm25.results import SegmentNeighbors, ShardWriter, read_results

SEARCH = {"num_segments": 4, "num_neighbors": 2}


def table(lists):
    starts = np.cumsum([0, *map(len, lists)])
    return SegmentNeighbors(np.array([i for found in lists for i in found], dtype=np.int32), starts)


def lists_of(neighbors):
    return [neighbors.of(i) for i in range(len(neighbors))]


@st.composite
def neighbor_lists(draw):
    count = draw(st.integers(1, 12))
    one = st.lists(st.integers(0, count - 1), max_size=4, unique=True)
    lists = draw(st.lists(one, min_size=count, max_size=count))
    return [[i for i in found if i != own] for own, found in enumerate(lists)]


def shards(folder, *contents):
    for number, content in enumerate(contents):
        (folder / f"shard{number}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_shards_are_put_together_whatever_their_order(tmp_path):
    shards(tmp_path, {"2": [0, 3], "3": []}, {"0": [1], "1": [2, 0]})
    (tmp_path / "shard0.partial").write_text("no part of it")
    assert lists_of(read_results(tmp_path)) == [[1], [2, 0], [0, 3], []]


def test_strings_of_the_original_program_are_numbers_here(tmp_path):
    assert lists_of(read_results(shards(tmp_path, {"0": ["1", "2"], "1": ["0"], "2": ["2", "0"]}))) == [
        [1, 2],
        [0],
        [0],
    ]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "holds no shard<i>.json"),
        ([{"0": [1], "1": [0]}, {"1": [0], "2": [0]}], r"holds 1 segments more than once \(1\)"),
        ([{"0": [1], "3": [0]}], r"lacks 2 of 4 segments \(1, 2\)"),
        ([{"0": [1], "1": [2]}], "names segment 2 as a neighbour, but holds results of segments 0 to 1"),
        ([{"0": [1], "1": [-1]}], "names segment -1"),
        ([{"0": ["one"], "1": [0]}], "is not a segment number"),
        ([{"zero": [1], "1": [0]}], "is not a segment number"),
        ([{"-1": [1], "1": [0]}], "holds segment -1"),
        ([[1, 2]], "does not hold a JSON object"),
    ],
)
def test_results_that_do_not_fit_are_reported(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        read_results(shards(tmp_path, *contents))


def test_a_missing_last_shard_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, 0, SEARCH)
    writer.add([(0, [1]), (1, [0])])
    writer.finish()
    with pytest.raises(ValueError, match=r"lacks 2 of 4 segments \(2, 3\)"):
        read_results(tmp_path)


def test_a_shard_is_complete_only_when_it_is_finished(tmp_path):
    writer = ShardWriter(tmp_path, 0, SEARCH)
    writer.add([(0, [1, 2]), (1, [])])
    assert not (tmp_path / "shard0.json").exists()
    with open(tmp_path / "shard0.partial", "a") as file:
        file.write('"2": [0, ')  # killed here
    again = ShardWriter(tmp_path, 0, SEARCH)
    assert (again.complete, again.num_done) == (False, 2)
    again.add([(2, [0]), (3, [1])])
    again.finish()
    assert json.loads((tmp_path / "shard0.json").read_text()) == {"0": [1, 2], "1": [], "2": [0], "3": [1]}
    assert not (tmp_path / "shard0.partial").exists()
    assert ShardWriter(tmp_path, 0, SEARCH).complete


def test_results_of_another_search_are_not_mixed_in(tmp_path):
    ShardWriter(tmp_path, 0, SEARCH)
    with pytest.raises(ValueError, match="num_neighbors was 2, is now 3"):
        ShardWriter(tmp_path, 1, SEARCH | {"num_neighbors": 3})


@given(neighbor_lists())
def test_reversed_neighbors(lists):
    found = lists_of(reverse(table(lists)))
    for target, owners in enumerate(found):
        holding = [(lists[own].index(target), own) for own in range(len(lists)) if target in lists[own]]
        assert owners == [own for _, own in sorted(holding)]


@given(neighbor_lists(), st.integers(0, 3))
def test_every_segment_is_in_the_chain_once(lists, seed):
    assert sorted(chain(table(lists), seed).tolist()) == list(range(len(lists)))


@given(neighbor_lists(), st.integers(0, 3))
def test_the_best_free_neighbor_follows(lists, seed):
    line = chain(table(lists), seed).tolist()
    for place, (segment, following) in enumerate(zip(line, line[1:])):
        free = [i for i in lists[segment] if i not in line[: place + 1]]
        if free:
            assert following == free[0]


def test_the_chain_goes_back_before_it_starts_again():
    # 0 -> 1 -> 2 is a dead end; 3 is like 1 and 4 names 0. 5 is like nothing.
    lists = [[1], [2, 3], [], [], [0], []]
    for seed in range(20):
        line = chain(table(lists), seed).tolist()
        if line[0] == 0:
            assert line == [0, 1, 2, 3, 4, 5]
            return
    raise AssertionError("no seed begins with 0")


@given(neighbor_lists(), st.randoms(use_true_random=False))
def test_the_rate_counts_pairs_of_neighbors(lists, random):
    order = list(range(len(lists)))
    random.shuffle(order)
    pairs = [b in lists[a] or a in lists[b] for a, b in zip(order, order[1:])]
    wanted = sum(pairs) / len(pairs) if pairs else 0.0
    assert neighbor_rate(np.array(order), table(lists)) == pytest.approx(wanted)


def test_topics_come_together_and_a_shuffle_does_not_bring_them():
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 100, 2000)
    members = [np.flatnonzero(topic == t) for t in range(100)]
    lists = [[i for i in rng.permutation(members[topic[own]]).tolist() if i != own][:10] for own in range(2000)]
    line = chain(table(lists), seed=0)
    assert neighbor_rate(line, table(lists)) > 0.9
    assert (topic[line[1:]] == topic[line[:-1]]).mean() > 0.9
    assert neighbor_rate(rng.permutation(2000), table(lists)) < 0.03


def test_no_segments_make_an_empty_line():
    assert chain(table([]), 0).tolist() == []
    assert neighbor_rate(np.array([], dtype=np.int64), table([])) == 0.0

"""Search of a store in ranges of rows: what one search of all rows finds, to the last bit, or a clear error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from local_workers import LocalWorkers

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.merge import merge
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.sharded.index import ATTEMPTS, ShardedIndex
from fairseq.memory.index.sharded.opening import open_sharded_index
from fairseq.memory.index.sharded.ranges import SearchSettings, check_cpus, check_not_replaced, cut, service_name
from fairseq.memory.types import Metric
from fairseq.runtime.config import check_target
from fairseq.runtime.ray_cluster import Node, place

DIM, PARTS = 8, (50, 3, 147)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """200 rows in three shards, with equal rows in several of them and deleted ones."""
    folder = tmp_path_factory.mktemp("parts")
    keys = np.random.default_rng(0).standard_normal((sum(PARTS), DIM), dtype=np.float32)
    keys[[51, 60, 199]] = keys[7]
    start = 0
    for number, rows in enumerate(PARTS):
        with DatastoreWriter(folder / f"{number}", rows, DIM, "float16", {}) as writer:
            writer.append(keys[start : start + rows], np.arange(start, start + rows))
            writer.finish()
        start += rows
    merge(folder / "d", [folder / f"{number}" for number in range(len(PARTS))])
    delete(folder / "d", np.array([0, 49, 50, 120]))
    return Datastore.open(folder / "d")


@pytest.fixture(scope="module")
def query_ND(  # noqa: N802
    store: Datastore,
) -> torch.Tensor:
    more = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1))
    return torch.cat([store.keys.take(torch.tensor([7, 60, 120])), more])


def workers(store: Datastore, count: int, metric: Metric = Metric.L2, **more) -> LocalWorkers:
    return LocalWorkers(cut(store, None, SearchSettings(metric), count), **more)


def require_equal(found, expected) -> None:
    assert found.ids_NK.equal(expected.ids_NK)
    assert found.scores_NK.equal(expected.scores_NK)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("count", [1, 3, 7, 200])
def test_ranges_find_what_one_search_finds(store, query_ND, count, metric):
    index = ShardedIndex(workers(store, count, metric), len(store))
    whole = ExactIndex(store.keys, metric, deleted=store.deleted)
    for k in (1, 4, 60, 196) if count < len(store) else (4,):  # 200 searches each
        require_equal(index.search(query_ND, k), whole.search(query_ND, k))
        require_equal(index.search(query_ND[:1], k), whole.search(query_ND[:1], k))
    ids_NM = torch.randint(-1, len(store), (len(query_ND), 9), generator=torch.Generator().manual_seed(2))
    assert index.score_rows(query_ND, ids_NM).equal(whole.score_rows(query_ND, ids_NM))
    assert (len(index), index.dim, index.metric, index.streams_keys) == (len(store), DIM, metric, True)
    np.testing.assert_array_equal(index.deleted, store.deleted)
    with pytest.raises(ValueError, match="--k 197 is larger"):
        index.search(query_ND, 197)


def test_batches_bound_what_is_under_way(store, query_ND):
    held = workers(store, 3, shared_bytes=4 * 5 * (12 * 3 * 4 + 4 * DIM))  # five queries a batch
    index = ShardedIndex(held, len(store))
    held.most_under_way = 0
    require_equal(index.search(query_ND, 4), ExactIndex(store.keys, deleted=store.deleted).search(query_ND, 4))
    assert held.most_under_way == 2 * 3
    with pytest.raises(ValueError, match="lower --k"):
        ShardedIndex(workers(store, 3, shared_bytes=100), len(store)).search(query_ND, 4)


def test_a_lost_worker_is_asked_again_and_one_that_stays_lost_is_an_error(store, query_ND):
    held = workers(store, 3)
    index, whole = ShardedIndex(held, len(store)), ExactIndex(store.keys, deleted=store.deleted)
    for _ in range(10):
        held.deaths = {1: ATTEMPTS - 1}
        require_equal(index.search(query_ND, 5), whole.search(query_ND, 5))
    assert held.lives == [0, 10 * (ATTEMPTS - 1), 0]
    held.deaths = {2: ATTEMPTS}
    with pytest.raises(OSError, match=f"worker 2 of 3 .* stays lost after {ATTEMPTS} attempts"):
        index.search(query_ND, 5)
    held.deaths, held.gone = {2: 1}, {2}
    with pytest.raises(OSError, match="stays lost after 1 attempts .its node is gone."):
        index.search(query_ND, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranges: [ranges[0], ranges[2]], "leaves a gap"),
        (lambda ranges: [ranges[0], ranges[0], *ranges[1:]], "overlaps"),
        (lambda ranges: ranges[:-1], "the workers hold"),
        (
            lambda ranges: [
                ranges[0],
                dataclasses.replace(ranges[1], settings=SearchSettings(Metric.IP)),
                ranges[2],
            ],
            "metric l2, worker 1 of ip",
        ),
    ],
)
def test_ranges_that_are_not_the_store_are_rejected(store, change, message):
    with pytest.raises(ValueError, match=message):
        ShardedIndex(LocalWorkers(change(cut(store, None, SearchSettings(), 3))), len(store))


def copied(store: Datastore, folder: Path) -> Datastore:
    for path in Path(store.prefix).parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return Datastore.open(folder / "d")


def test_files_that_a_worker_lacks_or_of_another_store_are_named(store, tmp_path):
    own = copied(store, tmp_path)
    ranges = cut(own, None, SearchSettings(), 3)
    metadata = tmp_path / "1.json"
    other = json.loads(metadata.read_text())
    metadata.write_text((tmp_path / "0.json").read_text())
    with pytest.raises(ValueError, match="1-fp16_keys.npy on .* is of another datastore"):
        ShardedIndex(LocalWorkers(ranges), len(own))
    metadata.write_text(json.dumps(other))
    (tmp_path / "1-fp16_keys.npy").unlink()
    with pytest.raises(ValueError, match="1-fp16_keys.npy is not on .*, where a worker is to search it"):
        ShardedIndex(LocalWorkers(ranges), len(own))


def test_an_index_for_each_shard_is_searched_and_one_over_all_is_one_range(store, query_ND, tmp_path):
    own, settings = copied(store, tmp_path), SearchSettings()
    for number, shard in enumerate(own.shards):
        name = str(tmp_path / f"knn.part{number}-of-{len(own.shards)}")
        build_index(BuildConfig(dstore_mmap=shard.prefix, faiss_index=name, index="flat", no_report=True))
    ranges = cut(own, str(tmp_path / "knn"), settings, 1)
    assert [each.rows for each in ranges] == list(PARTS)
    found = ShardedIndex(LocalWorkers(ranges), len(own)).search(query_ND, 60)
    expected = ExactIndex(own.keys, deleted=own.deleted).search(query_ND, 60)
    torch.testing.assert_close(found.scores_NK, expected.scores_NK, rtol=1e-4, atol=1e-4)
    build_index(BuildConfig(dstore_mmap=own.prefix, faiss_index=str(tmp_path / "knn"), index="flat", no_report=True))
    (whole,) = cut(own, str(tmp_path / "knn"), settings, 1)
    assert whole.rows == len(own)
    assert service_name(own, [whole]) != service_name(own, ranges)


def test_a_service_is_known_by_content_and_settings(store):
    names = {service_name(store, cut(store, None, SearchSettings(), count)) for count in (1, 3)}
    assert len(names) == 1
    assert service_name(store, cut(store, None, SearchSettings(Metric.IP), 1)) not in names


def test_a_service_of_a_store_that_was_replaced_is_told(store, tmp_path):
    def name_of(opened, metric=Metric.L2):
        return service_name(opened, cut(opened, None, SearchSettings(metric), 1))

    before = copied(store, tmp_path)
    served = [name_of(store), name_of(before, Metric.IP)]
    check_not_replaced(before, name_of(before), served)  # one place has another name, the other one other settings
    delete(before.prefix, np.arange(3))
    after = Datastore.open(before.prefix)
    with pytest.raises(ValueError, match="is older than its files: .*; restart fairseq-datastore serve, or give --sea"):
        check_not_replaced(after, name_of(after), served)
    check_not_replaced(after, name_of(after), [*served, name_of(after, Metric.IP)])


def test_more_workers_than_rows_or_cpus_can_bear_are_refused(store):
    with pytest.raises(ValueError, match=f"--search-workers 9000 are more than the {len(store)} rows of datastore"):
        open_sharded_index(store, "ray", SearchSettings(), None, 9000)
    check_cpus(32, 2.0)
    with pytest.raises(ValueError, match="--search-workers 33 are too many for the 2 CPUs of the Ray cluster.* run 32"):
        check_cpus(33, 2.0)


def test_workers_go_where_their_files_are():
    nodes = [Node("a", "a", 4), Node("b", "b", 2)]
    paths = [["x"], ["y"], ["z"]]
    everywhere = [[True] * 3] * 2
    assert [node.id for node in place(paths, nodes, everywhere)] == ["a", "a", "b"]
    assert [node.id for node in place(paths, nodes, [[False, True, True], [True, False, False]])] == ["b", "a", "a"]
    with pytest.raises(ValueError, match="no node of the Ray cluster has y"):
        place(paths, nodes, [[True, False, True], [True, False, True]])


@pytest.mark.parametrize("target", ["rai", "ray://", "ray://host", "host:6379"])
def test_other_targets_are_rejected(target):
    with pytest.raises(ValueError, match="is not ray or ray://HOST:PORT"):
        check_target("--search-on", target)

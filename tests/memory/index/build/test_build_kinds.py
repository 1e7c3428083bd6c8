"""Every kind of index: what plain faiss makes, however it was interrupted, in parts, or with its lists on disk."""

import errno
import functools
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from conftest import set_fast_products
from dying import Died, dies_at
from store_making import save_keys

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build import build, preflight
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.quality import recall
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss import builder, on_disk_lists
from fairseq.memory.index.faiss.builder import FaissBuilder
from fairseq.memory.index.faiss.index import FaissIndex, lists_of
from fairseq.memory.types import Metric

ROWS, DIM = 3000, 16
FACTORIES = ("HNSW8", "PCA8,IVF8,SQ8", "IVF8,Flat", "IVF8_HNSW8,SQ8", "PQ4x4fs", "IVF8,SQ8,RFlat")
PLAIN = [*INDEXES, *FACTORIES]


@functools.cache
def keys() -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = 2 * rng.standard_normal((10, DIM))
    return (centers[rng.integers(0, 10, ROWS)] + rng.standard_normal((ROWS, DIM))).astype(np.float32)


QUERIES = torch.from_numpy(keys()[::30] + np.float32(0.01))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_keys(tmp_path_factory.mktemp("store") / "dstore", keys())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(preflight, "BLOCK_ROWS", 256)
    monkeypatch.setattr(build, "_SAVING_SHARE", 1e9)
    monkeypatch.setattr(on_disk_lists, "_SLICE_ROWS", 700)


def config(store: Path, folder: Path, **more) -> BuildConfig:
    settings = {"ncentroids": 8, "code_size": 4, "num_keys_to_add_at_a_time": 500}
    return BuildConfig(dstore_mmap=str(store), faiss_index=str(folder / "knn.index"), **(settings | more))


@pytest.mark.parametrize("dist", ["l2", "ip", "cos"])
@pytest.mark.parametrize("kind", PLAIN)
def test_recall_is_that_of_plain_faiss(store, tmp_path, kind, dist):
    built = build_index(config(store, tmp_path, index=kind, dist=dist))
    metric = Metric(dist)
    rows = keys() / np.linalg.norm(keys(), axis=1, keepdims=True) if metric is Metric.COS else keys()
    measure = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    plain = faiss.index_factory(DIM, config(store, tmp_path, index=kind).factory(DIM), measure)
    plain.train(rows)
    plain.add(rows)
    truth = ExactIndex(keys(), metric).search(QUERIES, 20).ids_NK
    found = []
    for index in (FaissIndex.open(built.path, metric), FaissIndex(plain, metric)):
        index.set_probe(4)
        found.append(recall(index.search(QUERIES, 20).ids_NK, truth))
    assert len(FaissIndex.open(built.path, metric)) == ROWS
    assert found[0] >= found[1] - 0.08  # few lists, few queries: where the lists begin is chance
    assert {path.name for path in tmp_path.iterdir()} == {f"knn.index.{dist}", f"knn.index.{dist}.json"}


@pytest.mark.parametrize("kind", ["ivfpq", "ivfpq-fastscan", "PCA8,IVF8,SQ8"])
def test_without_fast_integers_faiss_makes_the_lists(store, tmp_path, kind, monkeypatch, caplog):
    caplog.set_level("INFO")
    set_fast_products(monkeypatch, "float32")
    monkeypatch.setattr(builder, "kmeans", lambda *_, **__: pytest.fail("is slower"))
    first = build_index(config(store, tmp_path / "a", index=kind))
    assert build_index(config(store, tmp_path / "b", index=kind)).path.read_bytes() == first.path.read_bytes()
    assert "faiss makes the lists" in caplog.text
    index, truth = FaissIndex.open(first.path, Metric.L2), ExactIndex(keys()).search(QUERIES, 20).ids_NK
    index.set_probe(8)
    assert recall(index.search(QUERIES, 20).ids_NK, truth) > 0.4


def test_fast_scans_codes_are_those_of_adding_keys_directly(store, tmp_path):
    index = faiss.read_index(str(build_index(config(store, tmp_path, index="ivfpq-fastscan")).path))
    again = faiss.read_index(str(tmp_path / "knn.index.l2"))
    assert type(index).__name__ == "IndexIVFPQFastScan"
    again.reset()
    again.add(keys())
    index.nprobe = again.nprobe = 8
    for one, other in zip(index.search(QUERIES.numpy(), 9), again.search(QUERIES.numpy(), 9)):
        np.testing.assert_array_equal(one, other)


@functools.cache
def whole(kind: str, store: Path) -> bytes:
    settings = config(store, store.parent / kind.replace(",", "-"), index=kind)
    return build_index(settings).path.read_bytes()


@pytest.mark.parametrize("call", [0, 2, 7])
@pytest.mark.parametrize("step", ["train", "encode", "add", "save", "save_finished"])
@pytest.mark.parametrize("kind", ["ivfpq-fastscan", "ivfrabitq", "HNSW8", "flat", "PQ4x4fs"])
def test_a_build_goes_on_after_dying_anywhere(store, tmp_path, monkeypatch, kind, step, call):
    expected = whole(kind, store)
    settings = config(store, tmp_path / "died", index=kind)
    with dies_at(monkeypatch, step, call, tmp_path / "died" / "knn.index.l2"):
        build_index(settings)
    assert build_index(settings).path.read_bytes() == expected
    assert len(list((tmp_path / "died").iterdir())) == 2


def test_a_graph_goes_on_where_it_was_saved(store, tmp_path, monkeypatch):
    added = []
    original = FaissBuilder.add

    def counted(self, keys_ND, threads=1):
        if len(added) == 6:
            added.append(0)
            raise Died
        added.append(len(keys_ND))
        original(self, keys_ND, threads)

    monkeypatch.setattr(FaissBuilder, "add", counted)
    with pytest.raises(Died):
        build_index(config(store, tmp_path, index="HNSW8"))
    assert build_index(config(store, tmp_path, index="HNSW8")).path.read_bytes() == whole("HNSW8", store)
    assert sum(added) == ROWS  # 1536 before, the others after: none twice


@pytest.mark.parametrize("kind", ["ivfpq", "ivfpq-fastscan", "ivfsq8", "ivfrabitq", "flat"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_make_the_index_that_one_command_makes(store, tmp_path, kind, order):
    for shard in order:
        built = build_index(config(store, tmp_path, index=kind, num_shards=3, shard_id=shard))
        assert bool(built.missing) == (shard != order[-1])
    assert built.path.read_bytes() == whole(kind, store)
    assert {path.name for path in tmp_path.iterdir()} == {"knn.index.l2", "knn.index.l2.json"}
    # Every part's command finds its work done.
    assert not build_index(config(store, tmp_path, index=kind, num_shards=3, shard_id=1)).missing


def test_parts_are_merged_when_they_are_told_to(store, tmp_path):
    for shard in (0, 1):
        build_index(config(store, tmp_path / str(shard), num_shards=2, shard_id=shard))
    with pytest.raises(ValueError, match=r"lacks the parts 1 of 2; run the same command with the --shard_id of each"):
        build_index(config(store, tmp_path / "0", num_shards=2, merge=True))
    for path in (tmp_path / "1").glob("*.part1-of-2.*"):
        path.rename(tmp_path / "0" / path.name)
    assert build_index(config(store, tmp_path / "0", num_shards=2, merge=True)).path.read_bytes() == whole(
        "ivfpq", store
    )
    (tmp_path / "1" / "knn.index.l2.trained").unlink()
    with pytest.raises(ValueError, match="lacks the parts 0, 1 of 2"):
        build_index(config(store, tmp_path / "1", num_shards=2, merge=True))


def test_parts_of_different_builds_are_not_mixed_and_not_lost(store, tmp_path):
    build_index(config(store, tmp_path, num_shards=2, shard_id=0))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more, message in (
        ({"seed": 2}, "is of parts with seed 1, this one has 2: give the same flags to all parts"),
        ({"code_size": 8}, "is of parts with factory 'IVF8,PQ4np', this one has 'IVF8,PQ8np'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_index(config(store, tmp_path, num_shards=2, shard_id=1, **more))
    with DatastoreWriter(tmp_path / "d", ROWS, DIM, "float32", {}) as writer:
        writer.append(keys() + 1, np.arange(ROWS))
        writer.finish()
    with pytest.raises(ValueError, match="is of parts over other keys"):
        build_index(config(tmp_path / "d", tmp_path, num_shards=2, shard_id=1))
    for name, content in kept.items():
        assert (tmp_path / name).read_bytes() == content
    assert build_index(config(store, tmp_path, num_shards=2, shard_id=1)).path.read_bytes() == whole("ivfpq", store)


@pytest.mark.parametrize("kind", ["HNSW8", "ivfpq"])
def test_what_a_killed_build_left_may_be_damaged(store, tmp_path, monkeypatch, kind, caplog):
    settings = config(store, tmp_path, index=kind)
    with monkeypatch.context() as patch:
        patch.setattr(build._Build, "assemble", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            build_index(settings)
    for name in ("trained", "codes.tmp"):
        path = tmp_path / f"knn.index.l2.{name}"
        path.write_bytes(path.read_bytes()[:100])
    assert build_index(settings).path.read_bytes() == whole(kind, store)
    assert "adding all rows again" in caplog.text or "training again" in caplog.text


@pytest.mark.parametrize("kind", ["ivfpq", "ivfsq8", "PCA8,IVF8,SQ8"])
def test_lists_on_disk_are_found_wherever_the_files_lie(store, tmp_path, kind):
    built = build_index(config(store, tmp_path / "a", index=kind, on_disk=True, num_shards=2, shard_id=0))
    built = build_index(config(store, tmp_path / "a", index=kind, on_disk=True, num_shards=2, shard_id=1))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        f"knn.index.l2{end}" for end in ("", ".ivfdata", ".json")
    }
    assert built.bytes == sum((tmp_path / "a" / f"knn.index.l2{end}").stat().st_size for end in ("", ".ivfdata"))
    (tmp_path / "a").rename(tmp_path / "b")
    index = FaissIndex.open(tmp_path / "b" / "knn.index", Metric.L2)
    plain = FaissIndex.open(build_index(config(store, tmp_path / "c", index=kind)).path, Metric.L2)
    for each in (index, plain):
        each.set_probe(3)
    assert type(faiss.downcast_InvertedLists(lists_of(index.inner).invlists)).__name__ == "OnDiskInvertedLists"
    for query in (QUERIES, QUERIES[:2]):
        one, other = index.search(query, 30), plain.search(query, 30)
        assert torch.equal(one.ids_NK, other.ids_NK)
        assert torch.equal(one.scores_NK, other.scores_NK)
    (tmp_path / "b" / "knn.index.l2.ivfdata").unlink()
    with pytest.raises(ValueError, match=r"ivfdata is missing: it holds the lists of"):
        FaissIndex.open(tmp_path / "b" / "knn.index", Metric.L2)


def test_a_disk_that_gets_full_is_told_and_the_build_goes_on(store, tmp_path, monkeypatch):
    settings = config(store, tmp_path, on_disk=True)
    with monkeypatch.context() as patch:
        patch.setattr(on_disk_lists.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        patch.setattr(
            on_disk_lists, "_write_slice", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", "slice"))
        )
        with pytest.raises(OSError, match="full"):
            build_index(settings)
    free = iter([1 << 40, 100])
    with monkeypatch.context() as patch:
        patch.setattr(on_disk_lists.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
        with pytest.raises(OSError, match=r"No space left.*ivfdata"):
            build_index(settings)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12 * ROWS - 500, limits[1]))  # 4 bytes of code and 8 of a row's number
    try:
        with pytest.raises(OSError, match="ivfdata cannot be written"):
            build_index(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} <= {
        f"knn.index.l2.{end}" for end in ("trained", "trained.json", "codes.tmp", "progress.json")
    }
    monkeypatch.setattr(FaissBuilder, "encode", lambda *_: pytest.fail("encoded again"))
    assert build_index(settings).rows == ROWS
    assert {path.name for path in tmp_path.iterdir()} == {f"knn.index.l2{end}" for end in ("", ".json", ".ivfdata")}


@pytest.mark.parametrize("kind", ["ivfpq", "ivfpq-fastscan", "ivfrabitq", "flat", "HNSW8"])
def test_a_mapped_index_finds_the_same(store, tmp_path, kind):
    path = build_index(config(store, tmp_path, index=kind)).path
    one, other = (FaissIndex.open(path, Metric.L2, mapped=mapped) for mapped in (False, True))
    for query in (QUERIES, QUERIES[:2]):
        assert torch.equal(one.search(query, 10).ids_NK, other.search(query, 10).ids_NK)


def headerless(folder: Path, bad: dict[int, float]) -> Path:
    rows = keys().copy()
    for row, value in bad.items():
        rows[row, 3] = value
    rows.tofile(folder / "other_keys.npy")
    np.arange(ROWS).tofile(folder / "other_vals.npy")
    return folder / "other"


@pytest.mark.parametrize("kind", ["ivfpq", "flat", "HNSW8", "ivfpq-fastscan"])
@pytest.mark.parametrize("dist", ["l2", "cos"])
def test_keys_that_are_not_finite_are_counted_and_dropped_on_demand(tmp_path, kind, dist, monkeypatch):
    bad = {0: np.nan, 700: np.inf, 2999: -np.inf}
    prefix = headerless(tmp_path, bad)
    settings = {"index": kind, "dist": dist, "dstore_size": ROWS, "dimension": DIM}
    with monkeypatch.context() as patch:
        patch.setattr(FaissBuilder, "train", lambda *_: pytest.fail("began to work"))
        with pytest.raises(
            ValueError, match="3 keys of datastore .* hold NaN or infinity, the first in row 0; --drop_n"
        ):
            build_index(config(prefix, tmp_path, **settings))
    built = build_index(config(prefix, tmp_path, drop_nonfinite=True, **settings))
    assert json.loads(Path(f"{built.path}.json").read_text())["left_out"] == [0, 700, 2999]
    index = FaissIndex.open(built.path, Metric(dist))
    index.set_probe(8)
    assert index.num_alive == ROWS - 3
    for query in (QUERIES, QUERIES[:1], torch.zeros(1, DIM)):
        found = index.search(query, 50).ids_NK
        assert not np.isin(found.numpy(), list(bad)).any()


def test_a_key_that_was_damaged_in_our_own_store_is_told(store, tmp_path):
    with DatastoreWriter(tmp_path / "d", ROWS, DIM, "float32", {}) as writer:
        writer.append(keys(), np.arange(ROWS))
        writer.finish()
    np.memmap(tmp_path / "d_keys.npy", np.float32, "r+", shape=(ROWS, DIM))[1234, 0] = np.nan
    for kind in ("ivfpq", "HNSW8"):
        with pytest.raises(ValueError, match=r"1 keys of datastore .* hold NaN or infinity, the first in row 1234"):
            build_index(config(tmp_path / "d", tmp_path, index=kind))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"index": "IVF8,PQ5"}, r"faiss cannot make an index 'IVF8,PQ5' over keys of width 16"),
        ({"index": "HNWS32"}, r"faiss cannot make an index 'HNWS32' .* see docs/indexes.md"),
        ({"index": "IDMap,Flat"}, "cannot be filled row by row"),
        ({"index": "NSG16,Flat"}, "cannot be filled row by row"),
        ({"index": "LSH", "dist": "ip"}, "faiss cannot make an index 'LSH' .* with metric ip"),
        ({"index": "IVF4000,Flat"}, "--index IVF4000,Flat: IVF is more than the datastore's 3000 rows"),
        (
            {"index": "HNSW8", "num_shards": 2},
            "--index HNSW8 cannot be built from parts, as --num_shards requires; drop --num_shards",
        ),
        (
            {"index": "HNSW8", "on_disk": True},
            "--index HNSW8 cannot be built from parts, as --on_disk requires; drop --on_disk",
        ),
        ({"index": "flat", "on_disk": True}, "--index flat has no lists that --on_disk can keep"),
        ({"index": "ivfpq-fastscan", "on_disk": True}, "has no lists that --on_disk can keep"),
        ({"index": "ivfpq-fastscan", "code_size": 16}, "--code_size 16 does not divide the width 16; give 8, say"),
        ({"num_shards": 13}, "--num_shards 13 is too many for 3000 rows; give at most 12"),
    ],
)
def test_what_cannot_work_is_told_first(store, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(FaissBuilder, "train", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ValueError, match=message):
        build_index(config(store, tmp_path, **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shard_id": 1}, r"--shard_id 1 is not in 0..0 \(--num_shards\)"),
        ({"merge": True}, "--merge requires --num_shards"),
        ({"index": "ivf-sq8"}, "unknown --index 'ivf-sq8' .did you mean 'ivfsq8'"),
        ({"graph_threads": 0}, "--graph_threads must be at least 1, got 0"),
        ({"report_k": 0}, "--report_k must be at least 1, got 0"),
    ],
)
def test_impossible_settings(more, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(dstore_mmap="d", faiss_index="i", **more)


def test_too_few_keys_for_a_compression_are_told(tmp_path):
    with DatastoreWriter(tmp_path / "few", 300, DIM, "float32", {}) as writer:
        writer.append(keys()[:300], np.arange(300))
        writer.finish()
    with pytest.raises(ValueError, match=r"faiss cannot train IVF8,PQ4x10 on 300 keys .*; choose a simpler --index"):
        build_index(config(tmp_path / "few", tmp_path, index="IVF8,PQ4x10"))
    assert len(Datastore.open(tmp_path / "few")) == 300

"""Building an index: nothing lost, nothing twice, the same bytes however often it was killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from dying import Died, dies_at
from store_making import save_keys

from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build import build, preflight
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.builder import FaissBuilder
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.types import Metric

ROWS, DIM = 1500, 8
# Recall of the 8 nearest among 16 returned.
FLOOR = {"flat": 0.99, "ivfpq": 0.6, "ivfsq8": 0.98, "ivfpq-fastscan": 0.4, "ivfrabitq": 0.4}


def keys() -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = 2 * rng.standard_normal((10, DIM))
    return (centers[rng.integers(0, 10, ROWS)] + rng.standard_normal((ROWS, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return save_keys(tmp_path_factory.mktemp("store") / "dstore", keys())


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> bytes:
    """The index as one undisturbed build makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "BLOCK_ROWS", 128)
        return build_index(config(store, tmp_path_factory.mktemp("whole"))).path.read_bytes()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(preflight, "BLOCK_ROWS", 128)


def config(store: Path, folder: Path, **more) -> BuildConfig:
    settings = {"ncentroids": 8, "code_size": 2, "num_keys_to_add_at_a_time": 500}
    return BuildConfig(dstore_mmap=str(store), faiss_index=str(folder / "knn.index"), **(settings | more))


def test_few_rows_are_reported_in_one_line(tmp_path, caplog, capfd):
    few = save_keys(tmp_path / "few", keys()[:300])
    build_index(config(few, tmp_path, ncentroids=64))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("300 training rows are few for 64 lists of IVF64,PQ2np: 9984 or more make good ones; ")
    assert "give --ncentroids 7" in line
    assert "WARNING clustering" not in "".join(capfd.readouterr()), "faiss says it once for each byte of a code"
    for index in ("OPQ2_4,IVF16,PQ2np", "HNSW8", "PQ2"):
        build_index(config(few, tmp_path / index, index=index))
    assert "WARNING clustering" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("dist", ["l2", "ip", "cos"])
@pytest.mark.parametrize("kind", sorted(INDEXES))
def test_search_finds_what_brute_force_finds(store, tmp_path, kind, dist):
    built = build_index(config(store, tmp_path, index=kind, dist=dist))
    assert built.path == tmp_path / f"knn.index.{dist}"
    assert built.rows == ROWS
    index = FaissIndex.open(tmp_path / "knn.index", Metric(dist))
    assert len(index) == ROWS
    index.set_probe(8)
    queries = torch.from_numpy(keys()[::20] + np.float32(0.01))
    found = index.search(queries, 16).ids_NK.tolist()
    truth = ExactIndex(keys(), Metric(dist)).search(queries, 8).ids_NK.tolist()
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found, truth)])
    assert recall >= FLOOR[kind]
    left = {f"knn.index.{dist}", f"knn.index.{dist}.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_codes_are_those_of_adding_keys_directly(store, tmp_path):
    built = build_index(config(store, tmp_path))
    index = faiss.read_index(str(built.path))
    again = faiss.read_index(str(built.path))
    again.reset()
    again.add(keys())
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        assert size == again.invlists.list_size(number)
        for read, width in (("get_ids", 1), ("get_codes", index.code_size)):
            one, other = (faiss.rev_swig_ptr(getattr(i.invlists, read)(number), size * width) for i in (index, again))
            np.testing.assert_array_equal(one, other)


def test_same_seed_same_bytes_whatever_the_steps_and_the_store_layout(store, whole, tmp_path):
    assert build_index(config(store, tmp_path / "b", num_keys_to_add_at_a_time=10_000)).path.read_bytes() == whole
    for name in ("_keys.npy", "_vals.npy"):
        (tmp_path / f"plain{name}").symlink_to(f"{store}{name}")
    stated = config(tmp_path / "plain", tmp_path / "c", dstore_size=ROWS, dimension=DIM)
    assert build_index(stated).path.read_bytes() == whole
    assert build_index(config(store, tmp_path / "d", seed=2)).path.read_bytes() != whole


def test_the_probe_becomes_the_index_default(store, tmp_path):
    path = build_index(config(store, tmp_path, probe=3)).path
    assert faiss.read_index(str(path)).nprobe == 3


@pytest.mark.parametrize("step", ["train", "encode", "add_codes", "save"])
@pytest.mark.parametrize("call", [0, 1, 5])
def test_a_build_goes_on_after_dying_anywhere(store, whole, tmp_path, monkeypatch, step, call):
    settings = config(store, tmp_path / "died", num_keys_to_add_at_a_time=300)
    with dies_at(monkeypatch, step, call, tmp_path / "died" / "knn.index.l2"):
        build_index(settings)
    assert build_index(settings).path.read_bytes() == whole
    assert len(list((tmp_path / "died").iterdir())) == 2


def test_resuming_does_not_encode_twice(store, tmp_path, monkeypatch, caplog):
    settings = config(store, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(build._Build, "assemble", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            build_index(settings)
    monkeypatch.setattr(FaissBuilder, "encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(FaissBuilder, "train", lambda *_: pytest.fail("trained again"))
    assert build_index(settings).rows == ROWS
    caplog.set_level("INFO")
    build_index(settings)
    assert "is complete already" in caplog.text


def test_leftovers_of_another_command_are_not_used(store, whole, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(build._Build, "assemble", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            build_index(config(store, tmp_path, seed=4))
    assert build_index(config(store, tmp_path)).path.read_bytes() == whole
    assert "another command left an unfinished build" in caplog.text


def test_an_index_over_older_keys_is_built_anew(store, tmp_path):
    mine = tmp_path / "dstore"
    for shift in (0.0, 1.0):
        with DatastoreWriter(mine, ROWS, DIM, "float32", {}) as writer:
            writer.append(keys() + np.float32(shift), np.arange(ROWS))
            writer.finish()
        built = build_index(config(mine, tmp_path))
        found = FaissIndex.open(built.path, Metric.L2).search(torch.from_numpy(keys()[:50] + np.float32(shift)), 1)
        assert found.scores_NK.mean() > -20


def build_elsewhere(settings: BuildConfig, started) -> None:
    preflight.BLOCK_ROWS = 128
    started.set()
    build_index(settings)


@pytest.mark.slow
def test_kill_at_random_points_gives_the_same_bytes(store, whole, tmp_path):
    settings = config(store, tmp_path / "killed", num_keys_to_add_at_a_time=300)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use OpenMP after its parent has
    delays = np.random.default_rng().uniform(0.0, 0.3, 3)
    for delay in delays:
        started = spawn.Event()
        process = spawn.Process(target=build_elsewhere, args=(settings, started))
        process.start()
        started.wait(60)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert build_index(settings).path.read_bytes() == whole, delays


def test_starting_point_never_drops_rows(store, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--starting_point 1000 would skip rows 0 to 999: 0 rows are"):
        build_index(config(store, tmp_path, starting_point=1000))
    with monkeypatch.context() as patch:
        patch.setattr(build._Build, "assemble", lambda *_: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            build_index(config(store, tmp_path))
    assert build_index(config(store, tmp_path, starting_point=1000)).rows == ROWS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"code_size": 5}, "--code_size 5 does not divide the width 8; give 4, say"),
        ({"ncentroids": 5000}, "--ncentroids 5000 is more than the datastore's 1500 rows; give about 15"),
        ({"dimension": 16}, "has keys of width 8; --dimension says 16: drop it"),
        ({"dstore_size": 99}, "has 1500 rows; --dstore-size says 99"),
        ({"dstore_fp16": True}, "holds float32 keys and --dstore-fp16 was given"),
        ({"train_size": 4}, "--train_size 4 is less than --ncentroids 8"),
    ],
)
def test_what_cannot_work_is_told_first(store, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(FaissBuilder, "train", lambda *_: pytest.fail("began to work"))
    with pytest.raises(ValueError, match=message):
        build_index(config(store, tmp_path, **more))


def test_no_space_no_folder_and_too_few_rows(store, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write in"):
        build_index(config(store, tmp_path / "file" / "folder"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
        with pytest.raises(OSError, match=r"needs about \d+ bytes, .* has 10 free"):
            build_index(config(store, tmp_path))
    with DatastoreWriter(tmp_path / "few", 100, DIM, "float32", {}) as writer:
        writer.append(keys()[:100], np.arange(100))
        writer.finish()
    with pytest.raises(ValueError, match="has 100 rows, compression learns from at least 256; use --index flat"):
        build_index(config(tmp_path / "few", tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ncentroids": 0}, "--ncentroids must be at least 1, got 0"),
        ({"starting_point": -1}, "--starting_point must be at least 0, got -1"),
        ({"dstore_size": 0}, "--dstore_size must be at least 1"),
        ({"index": "ivfpk"}, "unknown --index 'ivfpk' .did you mean 'ivfpq'"),
    ],
)
def test_impossible_settings(more, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(dstore_mmap="d", faiss_index="i", **more)

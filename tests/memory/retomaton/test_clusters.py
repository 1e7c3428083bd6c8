"""Clusters: their file, how they are made, and those of knn-transformers."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from brute_force import similarities
from store_making import DIM, rows, save

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.kmeans import kmeans
from fairseq.memory.retomaton.build_clusters import build_clusters
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq.memory.retomaton.clusters import Clusters, store_mark
from fairseq.memory.retomaton.foreign_clusters import OriginalFiles, open_clusters, read_members
from fairseq.memory.types import Metric
from fairseq_cli.build_dstore import main

ROWS = 500
MEMBERS = [np.array([3, 4, 9]), np.array([], np.int64), np.array([0, 7])]


def made(prefix: Path, **more: object) -> Clusters:
    config = ClusterConfig(dstore_mmap=str(prefix), num_clusters=12, **more)
    build_clusters(config)
    return Clusters.open(config.path, Datastore.open(prefix))


def members(clusters: Clusters) -> list[list[int]]:
    return [clusters.of(number).tolist() for number in range(len(clusters))]


def a_store(num_rows: int = 10) -> Datastore:
    keys, values = rows(num_rows)
    return Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})


def test_a_file_holds_the_same_clusters(tmp_path: Path) -> None:
    store = a_store()
    clusters = Clusters.of_members(MEMBERS, 10, store_mark(store))
    assert clusters.cluster_R.tolist() == [2, -1, -1, 0, 0, -1, -1, 2, -1, 0]
    clusters.save(tmp_path / "c.npz")
    assert members(Clusters.open(tmp_path / "c.npz", store)) == [rows.tolist() for rows in MEMBERS]
    assert members(open_clusters(tmp_path / "c.npz", store)) == [rows.tolist() for rows in MEMBERS]
    assert not list(tmp_path.glob("*.tmp"))


def test_clusters_of_other_rows_are_refused(tmp_path: Path) -> None:
    store = a_store()
    Clusters.of_members(MEMBERS, 10, store_mark(store)).save(tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"clusters of 10 rows, datastore 'store' has 11"):
        Clusters.open(tmp_path / "c.npz", a_store(11))
    changed = store.values.chunks[0].copy()
    changed[3] += 1
    with pytest.raises(ValueError, match="of other rows than datastore 'store' holds now"):
        Clusters.open(tmp_path / "c.npz", Datastore("store", store.keys, ChunkedArray.of(changed), {}))


def test_a_store_saved_anew_makes_its_clusters_stale(tmp_path: Path) -> None:
    save(tmp_path / "one", ROWS)
    save(tmp_path / "two", ROWS, seed=1)
    made(tmp_path / "one")
    with pytest.raises(ValueError, match="of other rows than datastore"):
        Clusters.open(tmp_path / "one.clusters.npz", Datastore.open(tmp_path / "two"))


def damaged(path: Path, **arrays: object) -> None:
    with np.load(path) as held:
        content = dict(held) | arrays
    np.savez(path, **content)


@pytest.mark.parametrize(
    "arrays",
    [
        {"members": np.array([3, 4, 99, 0, 7], np.int32)},
        {"members": np.array([3, 4, -9, 0, 7], np.int32)},
        {"first": np.array([0, 3, 3, 4])},
        {"first": np.array([0, 5, 3, 5])},
        {"cluster": np.zeros(10, np.int32)},
        {"cluster": np.zeros(10)},
        {"first": np.array([], np.int64)},
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    Clusters.of_members(MEMBERS, 10).save(tmp_path / "c.npz")
    damaged(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match="its arrays contradict each other"):
        Clusters.open(tmp_path / "c.npz", a_store())


def test_files_that_are_no_clusters_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(ValueError, match=r"no clusters at .*--cluster_dstore"):
        Clusters.open(path, a_store())
    Clusters.of_members(MEMBERS, 10).save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.npz is no whole file of clusters"):
            Clusters.open(path, a_store())
    np.savez(path, some=np.zeros(3))
    with pytest.raises(ValueError, match="of another program or release"):
        Clusters.open(path, a_store())


def test_a_row_is_in_one_cluster() -> None:
    with pytest.raises(ValueError, match="in more than one cluster"):
        Clusters.of_members([np.array([1, 2]), np.array([2])], 5)
    with pytest.raises(ValueError, match="row 5 of a datastore of 5"):
        Clusters.of_members([np.array([1, 5])], 5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_row_is_in_the_cluster_of_the_nearest_centroid(tmp_path: Path, dtype: str) -> None:
    save(tmp_path / "dstore", ROWS, dtype=dtype)
    clusters = made(tmp_path / "dstore", sample_size=200, seed=3)
    keys = Datastore.open(tmp_path / "dstore").keys.block(0, ROWS).float()
    sample = keys[np.sort(np.random.default_rng(3).choice(ROWS, 200, replace=False))]
    centroids = kmeans.kmeans(sample, 12, seed=3).numpy()
    assert clusters.cluster_R.tolist() == similarities(Metric.L2, keys.numpy(), centroids).argmax(1).tolist()
    assert sorted(clusters.member_R.tolist()) == list(range(ROWS))
    assert all((np.diff(clusters.of(number)) > 0).all() for number in range(12))
    assert {path.name for path in tmp_path.iterdir() if "clusters" in path.name} == {"dstore.clusters.npz"}


def test_a_killed_run_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq.memory.retomaton.build_clusters._BLOCK_ROWS", 100)
    save(tmp_path / "dstore", ROWS)
    whole = made(tmp_path / "dstore", clusters=str(tmp_path / "whole.npz"))
    sort, calls = kmeans.Assigner.__call__, []

    def killed(self: kmeans.Assigner, keys_ND: torch.Tensor) -> torch.Tensor:
        calls.append(len(keys_ND))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sort(self, keys_ND)

    monkeypatch.setattr(kmeans.Assigner, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "dstore")
    assert not (tmp_path / "dstore.clusters.npz").exists()
    again = made(tmp_path / "dstore")
    assert len(calls) == 3 + 3  # two of five blocks were done
    assert members(again) == members(whole)
    made(tmp_path / "dstore")
    assert len(calls) == 6  # complete: nothing is done


def test_what_another_command_left_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "dstore", ROWS)
    whole = made(tmp_path / "dstore", clusters=str(tmp_path / "whole.npz"), seed=2)
    with monkeypatch.context() as patched:
        patched.setattr(Clusters, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "dstore", seed=1)
    assert members(made(tmp_path / "dstore", seed=2)) == members(whole)


def test_a_key_that_is_not_finite_is_in_no_cluster(tmp_path: Path) -> None:
    keys, values = rows(40)
    keys[:5, 0] = np.nan
    keys.tofile(tmp_path / "d_keys.npy")
    values.tofile(tmp_path / "d_vals.npy")
    config = {"dstore_mmap": str(tmp_path / "d"), "num_clusters": 2, "dimension": DIM}
    with pytest.raises(ValueError, match="key 0 of datastore .* holds NaN or infinity"):
        build_clusters(ClusterConfig(**config))
    chosen = np.random.default_rng(1).choice(40, 2, replace=False)
    assert chosen.min() >= 5  # the sample misses what is not finite
    build_clusters(ClusterConfig(**config, sample_size=2))
    found = Clusters.read(tmp_path / "d.clusters.npz")
    assert (found.cluster_R[:5] == -1).all()
    assert (found.cluster_R[5:] >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 501}, "--num_clusters 501 is more than the datastore's 500 rows; give about 5"),
        ({"num_clusters": 20, "sample_size": 10}, "--sample_size 10 is less than --num_clusters 20"),
        ({"dimension": 7}, "--dimension 7 is not the width of datastore"),
        ({"dstore_size": 7}, "has 500 rows; --dstore-size says 7"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    save(tmp_path / "dstore", ROWS)
    with pytest.raises(ValueError, match=message):
        build_clusters(ClusterConfig(dstore_mmap=str(tmp_path / "dstore"), **settings))


def test_the_command_makes_clusters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "dstore", ROWS)
    words = [
        "--dstore_mmap",
        str(tmp_path / "dstore"),
        "--cluster_dstore",
        "--num_clusters",
        "7",
        "--sample-size",
        "99",
    ]
    main(words)
    out = capsys.readouterr().out
    assert out.startswith("clustered 500 keys in ")
    assert "(7 clusters of a sample of 99)" in out
    assert len(Clusters.open(tmp_path / "dstore.clusters.npz", Datastore.open(tmp_path / "dstore"))) == 7
    assert (tmp_path / "dstore.clusters.npz.run.json").exists()
    with pytest.raises(ValueError, match="--num_clusters belongs to --cluster_dstore: give it too"):
        main([word for word in words if word != "--cluster_dstore"])
    with pytest.raises(ValueError, match="--ncentroids does not go with --cluster_dstore"):
        main([*words, "--ncentroids", "8"])


def object_array(parts: list[np.ndarray]) -> np.ndarray:
    array = np.empty(len(parts), object)
    array[:] = parts
    return array


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "content",
    [
        MEMBERS,
        tuple(MEMBERS),
        object_array(MEMBERS),
        [rows.tolist() for rows in MEMBERS],
        [set(rows.tolist()) for rows in MEMBERS],
        [[np.int64(row) for row in rows] for rows in MEMBERS],
        {2: MEMBERS[2], 0: MEMBERS[0], 1: MEMBERS[1]},
        np.array([[3, 4, 9], [-1, -1, -1], [0, 7, -1]], np.int32),
    ],
    ids=["list", "tuple", "object array", "lists", "sets", "numbers", "dictionary", "padded array"],
)
def test_pickled_members_are_read(tmp_path: Path, content: object, protocol: int) -> None:
    path = tmp_path / "members_gpt2_10_4_10_3.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert members(open_clusters(path, a_store())) == [rows.tolist() for rows in MEMBERS]


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "members.pkl", tmp_path / "was-here"
    path.write_bytes(pickle.dumps([MEMBERS[0], Malicious(f"touch {mark}")], protocol))
    with pytest.raises(ValueError, match=r"it names (posix|nt)\.system"):
        read_members(path, a_store())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["builtins\neval", "builtins\ngetattr", "numpy\nload", "os\nsystem", "codecs\nencode"])
def test_every_other_name_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(b"c" + name.encode() + b"\n(S'x'\ntR.")
    with pytest.raises(ValueError, match="it names " + name.replace("\n", r"\.")):
        read_members(path, a_store())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([np.array([1.5])], "an array of float64"),
        (7, "it holds a int"),
        ([], "it holds a list, not the rows"),
        ([np.array([10])], "row 10 of a datastore of 10"),
        ([np.array([1]), np.array([1])], "in more than one cluster"),
        (["text"], "not a list of row numbers"),
    ],
)
def test_other_content_is_told(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_members(path, a_store())


def test_cut_and_missing_pickles_are_told(tmp_path: Path) -> None:
    path = tmp_path / "members.pkl"
    with pytest.raises(ValueError, match="no clusters at"):
        read_members(path, a_store())
    path.write_bytes(pickle.dumps(MEMBERS)[:-9])
    with pytest.raises(ValueError, match="no pickle of arrays"):
        read_members(path, a_store())
    named = tmp_path / "members_gpt2_11_4_10_3.pkl"
    named.write_bytes(pickle.dumps(MEMBERS))
    with pytest.raises(ValueError, match="by its name of a store of 11 rows of width 4"):
        read_members(named, a_store())


def test_files_of_knn_transformers_are_found_by_their_names(tmp_path: Path) -> None:
    names = ["dstore_gpt2_10_4_vals.npy", "dstore_gpt2_10_4_keys.npy", "index_gpt2_10_4.indexed"]
    for name in (*names, "members_gpt2_10_4_10_3.pkl", "dstore_distil_gpt2_8_4_vals.npy"):
        (tmp_path / name).touch()
    found = OriginalFiles.find(tmp_path, "gpt2")
    assert (found.prefix, found.rows, found.dim) == (tmp_path / "dstore_gpt2_10_4", 10, 4)
    assert found.index == tmp_path / "index_gpt2_10_4.indexed"
    assert found.members == tmp_path / "members_gpt2_10_4_10_3.pkl"
    other = OriginalFiles.find(tmp_path, "distil_gpt2")
    assert (other.rows, other.index, other.members) == (8, None, None)
    with pytest.raises(ValueError, match=r"holds dstore_distil_gpt2_8_4_vals\.npy, dstore_gpt2_10_4_vals\.npy as a"):
        OriginalFiles.find(tmp_path)
    with pytest.raises(ValueError, match="holds none as a store of model t5"):
        OriginalFiles.find(tmp_path, "t5")
    (tmp_path / "members_gpt2_10_4_10_5.pkl").touch()
    with pytest.raises(ValueError, match="several files of clusters"):
        OriginalFiles.find(tmp_path, "gpt2")


def csr_pickle(members: list[np.ndarray], num_rows: int, module: str, protocol: int, **changes: object) -> bytes:
    """What pickling a SciPy csr_matrix of ones at (cluster, row) gives, by a stand-in of that name."""
    kind = type("csr_matrix", (), {"__module__": module})
    parts = [types.ModuleType(name) for name in ("scipy", "scipy.sparse", module)]
    with pytest.MonkeyPatch.context() as patched:
        for part in parts:
            patched.setitem(sys.modules, part.__name__, part)
        parts[-1].csr_matrix = kind  # type: ignore[attr-defined]
        matrix = kind()
        sizes = [len(rows) for rows in members]
        matrix.__dict__ |= {
            "_shape": (len(members), num_rows),
            "maxprint": 50,
            "indices": np.concatenate(members).astype(np.int32),
            "indptr": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
            "data": np.ones(sum(sizes), np.int64),
        } | changes
        return pickle.dumps(matrix, protocol)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", ["scipy.sparse.csr", "scipy.sparse._csr"])
def test_a_pickled_csr_matrix_is_read_without_scipy(tmp_path: Path, module: str, protocol: int) -> None:
    path = tmp_path / "members_gpt2_10_4_10_3.pkl"
    path.write_bytes(csr_pickle(MEMBERS, 10, module, protocol))
    assert members(open_clusters(path, a_store())) == [rows.tolist() for rows in MEMBERS]
    shuffled = csr_pickle([rows[::-1] for rows in MEMBERS], 10, module, protocol, data=np.array([1, 0, 1, 1, 1]))
    path.write_bytes(shuffled)
    assert members(open_clusters(path, a_store())) == [[3, 9], [], [0, 7]]  # an explicit zero is no member


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indptr": np.array([0, 9, 3, 5])}, "indptr of its csr_matrix does not divide"),
        ({"indptr": np.array([0, 3])}, "indptr of its csr_matrix does not divide"),
        ({"data": np.ones(4)}, "lacks one of indptr, indices and data"),
        ({"indices": np.array([0.5] * 5)}, "lacks one of indptr, indices and data"),
        ({"indices": np.array([3, 4, 99, 0, 7])}, "row 99 of a datastore of 10"),
    ],
)
def test_a_damaged_csr_matrix_is_rejected(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(csr_pickle(MEMBERS, 10, "scipy.sparse._csr", 4, **changes))
    with pytest.raises(ValueError, match=message):
        read_members(path, a_store())


@pytest.mark.parametrize("name", ["csc_matrix", "csr_array", "save_npz"])
def test_no_other_class_of_scipy_is_admitted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(f"cscipy.sparse._csr\n{name}\n(tR.".encode())
    with pytest.raises(ValueError, match=rf"it names scipy\.sparse\._csr\.{name}"):
        read_members(path, a_store())


def test_the_reconstructor_of_old_pickles_makes_nothing_but_a_matrix(tmp_path: Path) -> None:
    path = tmp_path / "members.pkl"
    path.write_bytes(b"ccopy_reg\n_reconstructor\n(cbuiltins\ndict\ncbuiltins\nobject\nNtR.")
    with pytest.raises(ValueError, match="it makes an object of <class 'dict'>"):
        read_members(path, a_store())

"""Stores in folders: every file of theirs is found, moved and removed in the folder, and nothing else is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from dying import dies_at_event
from store_making import save
from test_sharded_stores import shards

from fairseq.memory.datastore.convert import convert, sample
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import compact, delete
from fairseq.memory.datastore.layout import StoreFiles, StoreName, side_file
from fairseq.memory.datastore.merge import join_shards, merge
from fairseq.memory.datastore.metadata import saved_shards, shard_prefix, store_files
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq.runtime.files import write_json
from fairseq.runtime.records import seal


def folder(path: Path) -> str:
    return f"{path}/"


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


def as_earlier_release(path: Path, num_shards: int) -> None:
    """Rename the shards of a folder store to the hidden names that they had, and list them as it did."""
    for file in list(path.iterdir()):
        if file.name.startswith("datastore.part"):
            file.rename(path / file.name.removeprefix("datastore"))
    if (path / "datastore.json").exists():
        content = json.loads((path / "datastore.json").read_text())
        for number, part in enumerate(content["parts"]):
            part["prefix"] = f"{path.name}/.part{number}-of-{num_shards}"
        write_json(path / "datastore.json", seal(content))


def test_compaction_removes_the_shards_of_its_own_folder_only(tmp_path):
    keys, _ = shards(folder(tmp_path / "fp16"), [5, 6])
    join_shards(folder(tmp_path / "fp16"), 2)
    save(tmp_path / ".part0-of-2", 4)  # files of another store, which have the names of the shards
    save(tmp_path / "datastore.part0-of-2", 4)
    delete(folder(tmp_path / "fp16"), np.array([0]))
    compact(folder(tmp_path / "fp16"))
    assert names(tmp_path / "fp16") == {"datastore.json", "keys.npy", "vals.npy", "docs.npy"}
    np.testing.assert_array_equal(Datastore.open(folder(tmp_path / "fp16")).keys, keys[1:])
    for other in (".part0-of-2", "datastore.part0-of-2"):
        Datastore.open(tmp_path / other).verify()


@pytest.mark.parametrize("kill_at", range(13))
def test_a_compaction_that_is_killed_leaves_nothing_and_takes_nothing_else(tmp_path, monkeypatch, kill_at):
    prefix = folder(tmp_path / "d")
    keys, _ = shards(prefix, [5, 6])
    join_shards(prefix, 2)
    save(tmp_path / ".part0-of-2", 4)
    delete(prefix, np.array([0, 7]))
    with dies_at_event(monkeypatch, kill_at):
        compact(prefix)
    compact(prefix)
    assert names(tmp_path / "d") == {"datastore.json", "keys.npy", "vals.npy", "docs.npy"}
    np.testing.assert_array_equal(Datastore.open(prefix).keys, np.delete(keys, [0, 7], axis=0))
    Datastore.open(tmp_path / ".part0-of-2").verify()


@pytest.mark.parametrize("where", ["plain", "folder"])
def test_a_shard_that_was_saved_again_is_not_removed(tmp_path, where):
    prefix = folder(tmp_path / "d") if where == "folder" else str(tmp_path / "d")
    shards(prefix, [5, 6])
    join_shards(prefix, 2)
    delete(prefix, np.array([0]))
    compact(prefix)
    first = shard_prefix(prefix, 0, 2)
    save(first, 3, seed=9)
    compact(prefix)
    assert len(Datastore.open(first)) == 3
    metadata = StoreFiles.of(prefix).metadata
    content = json.loads(metadata.read_text())
    del content["compaction"]["replaced_digests"]  # as an earlier release recorded it
    write_json(metadata, seal(content))
    compact(prefix)
    assert len(Datastore.open(first)) == 3


def test_a_store_of_shards_is_moved_and_opened_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys, _ = shards("a/", [3, 4])
    join_shards("a/", 2)
    os.rename("a", "b")
    np.testing.assert_array_equal(Datastore.open("b").keys, keys)
    monkeypatch.chdir(tmp_path / "b")
    for here in (".", "./", "../b"):
        np.testing.assert_array_equal(Datastore.open(here).keys, keys)
    assert not [name for name in names(tmp_path / "b") if name.startswith(".")]


def test_shards_of_an_earlier_release_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys, _ = shards("a/", [3, 4])
    as_earlier_release(tmp_path / "a", 2)
    with pytest.raises(ValueError, match="consists of 2 shards; join them"):
        Datastore.open("a/")
    merge("a/")
    as_earlier_release(tmp_path / "a", 2)
    for path in (tmp_path / "a", tmp_path / "b"):
        np.testing.assert_array_equal(Datastore.open(path).keys, keys)
        if path.name == "a":
            os.rename(path, tmp_path / "b")
    delete("b/", np.array([1]))
    compact("b/")
    assert names(tmp_path / "b") == {"datastore.json", "keys.npy", "vals.npy", "docs.npy"}


def test_shards_that_are_missing_are_named(tmp_path):
    prefix = folder(tmp_path / "d")
    shards(prefix, [3, 4])
    os.rename(tmp_path / "d" / "datastore.part1-of-2.json", tmp_path / "aside")
    assert saved_shards(prefix) == {2: {0}}
    with pytest.raises(ValueError, match="of its 2 shards 1 are not saved"):
        Datastore.open(prefix)


def test_a_folder_beside_a_store_of_its_name_stays_a_folder(tmp_path):
    save(tmp_path / "s3", 3)
    keys, _ = save(folder(tmp_path / "s3"), 5, seed=1)
    merge(tmp_path / "m", [folder(tmp_path / "s3"), tmp_path / "s3"])
    store = Datastore.open(tmp_path / "m")
    assert [part["prefix"] for part in store.metadata["parts"]] == ["s3/", "s3"]
    np.testing.assert_array_equal(store.keys.block(0, 5), keys)
    content = json.loads((tmp_path / "m.json").read_text())
    content["parts"][0]["prefix"] = "s3"  # as an earlier release wrote it
    write_json(tmp_path / "m.json", seal(content))
    assert len(Datastore.open(tmp_path / "m")) == 8


@pytest.mark.parametrize("where", ["d", "d/"])
def test_files_of_other_programs_are_not_overwritten(tmp_path, where):
    source = Datastore.open(tmp_path / "s") if save(tmp_path / "s", 4) else None
    (tmp_path / "d").mkdir()
    prefix = f"{tmp_path}/{where}"
    files = StoreFiles.of(prefix)
    files.keys.write_bytes(b"theirs")
    files.values.write_bytes(b"theirs")
    for work in (
        lambda: save(prefix, 3),
        lambda: convert(source, prefix, "float32", {}, drop=False),
        lambda: sample(source, prefix, 2, 1),
        lambda: merge(prefix, [tmp_path / "s"]),
    ):
        with pytest.raises(
            ValueError, match="would be overwritten and are of no datastore of ours .*move them away"
        ) as raised:
            work()
        assert f"{files.keys}, {files.values}" in str(raised.value)
        assert files.keys.read_bytes() + files.values.read_bytes() == b"theirstheirs"
        assert not files.metadata.exists()


def test_a_json_file_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "theirs"}')
    with pytest.raises(ValueError, match=r"package\.json would be overwritten and is of no datastore"):
        save(tmp_path / "package", 3)
    save(tmp_path / "d", 3)
    save(tmp_path / "d", 4)  # ours is replaced
    assert len(Datastore.open(tmp_path / "d")) == 4


@pytest.mark.parametrize("name", ["/", "//", "/.", ""])
def test_the_root_is_no_store(name):
    with pytest.raises(ValueError, match="is no name of a datastore; give a prefix or a folder"):
        save(name, 3)


def test_a_file_of_a_folder_store_means_the_folder(tmp_path):
    save(folder(tmp_path / "d"), 6)
    delete(tmp_path / "d" / "datastore", np.array([1]))
    for name in ("datastore", "datastore.json", "keys.npy", "vals.npy"):
        assert Datastore.open(tmp_path / "d" / name).deleted.tolist() == [1]
    assert "deleted.npy" in names(tmp_path / "d")


def test_a_prefix_called_datastore_keeps_its_names(tmp_path):
    save(tmp_path / "d" / "datastore", 6)
    for prefix in (folder(tmp_path / "d"), tmp_path / "d", tmp_path / "d" / "datastore"):
        assert len(Datastore.open(prefix)) == 6
        delete(prefix, np.array([1]))
    assert names(tmp_path / "d") == {f"datastore{e}" for e in (".json", "_keys.npy", "_vals.npy", ".deleted.npy")}


def test_files_beside_a_store_are_visible(tmp_path):
    prefix = folder(tmp_path / "d")
    assert side_file(prefix, "run.json") == f"{prefix}datastore.run.json"
    assert side_file(tmp_path / "d", "run.json") == f"{tmp_path / 'd'}.run.json"
    path = ClusterConfig(dstore_mmap=prefix).path
    assert path == tmp_path / "d" / "clusters.npz"
    path.parent.mkdir()
    path.with_name(".clusters.npz").touch()  # of an earlier release
    assert StoreName.of(prefix).existing_side_file("clusters.npz").name == ".clusters.npz"
    with pytest.raises(ValueError, match="--faiss_index st/ names a folder"):
        BuildConfig(dstore_mmap="st/", faiss_index="st/")


def test_messages_name_the_files_of_a_folder(tmp_path):
    prefix = folder(tmp_path / "d")
    with pytest.raises(ValueError, match=r"neither .*/d/datastore\.json nor .*/d/keys\.npy exists"):
        Datastore.open(prefix)
    with pytest.raises(ValueError, match=r"/d/datastore\.part0-of-N\.json does not exist: nothing to join"):
        merge(prefix)


def test_the_files_that_an_evaluation_reads(tmp_path):
    shards(folder(tmp_path / "d"), [3, 4])
    join_shards(folder(tmp_path / "d"), 2)
    ends = ("_keys.npy", "_vals.npy", "_docs.npy", ".json")
    parts = {f"datastore.part{shard}-of-2{end}" for shard in range(2) for end in ends}
    assert {path.name for path in store_files(tmp_path / "d")} == {"datastore.json", *parts}
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "keys.npy").touch()
    assert [path.name for path in store_files(folder(tmp_path / "o"))] == ["keys.npy"]

"""Stores made of others, deletion and verification, against arrays put together by numpy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from dying import dies_at_event
from hypothesis import given, settings
from hypothesis import strategies as st
from store_making import DIM, META, rows, save

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import compact, delete
from fairseq.memory.datastore.merge import join_shards, merge
from fairseq.memory.datastore.metadata import shard_prefix
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.runtime.files import locked


def shards(prefix: Path, sizes: list[int], dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Write the parts of a store that was saved in shards; returns its rows."""
    keys, values = rows(sum(sizes))
    first = 0
    for shard, size in enumerate(sizes):
        about = META | {"shard_id": shard, "num_shards": len(sizes), "first_row": first, "num_documents": 1}
        runs = np.array([[0, 0, first]])
        with DatastoreWriter(
            shard_prefix(prefix, shard, len(sizes)), size, DIM, dtype, about, documents=runs
        ) as writer:
            writer.append(keys[first : first + size], values[first : first + size])
            writer.finish()
        first += size
    return keys, values


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(max_examples=15, deadline=None)
def test_shards_are_one_store(tmp_path_factory, sizes, dtype):
    prefix = tmp_path_factory.mktemp("shards") / "d"
    keys, values = shards(prefix, sizes, dtype)
    assert join_shards(prefix, len(sizes))["rows"] == sum(sizes)
    store = Datastore.open(prefix)
    save(prefix.parent / "one", sum(sizes), dtype=dtype)
    one = Datastore.open(prefix.parent / "one")
    assert (len(store), store.dim, store.keys.dtype) == (len(one), one.dim, dtype)
    np.testing.assert_array_equal(store.keys, one.keys)
    np.testing.assert_array_equal(store.values, values)
    some = np.random.default_rng(0).integers(0, len(keys), 20)
    np.testing.assert_array_equal(store.take_keys(some), one.take_keys(some))
    np.testing.assert_array_equal(store.in_memory().keys, one.keys)
    np.testing.assert_array_equal(store.where(some), [np.zeros(20), some])
    window = np.pad(values, 2, constant_values=-1)
    np.testing.assert_array_equal(store.context(some, before=2, after=2), [window[row : row + 5] for row in some])
    store.verify()
    store.require(dim=DIM, size=len(values), key_tap="last_ffn_input", dictionary_size=50)


def test_shards_that_are_missing_are_named(tmp_path):
    shards(tmp_path / "d", [3, 4, 5])
    os.rename(tmp_path / "d.part1-of-3.json", tmp_path / "aside")
    assert join_shards(tmp_path / "d", 3) is None
    with pytest.raises(ValueError, match="of its 3 shards 1 are not saved"):
        Datastore.open(tmp_path / "d")
    with pytest.raises(ValueError, match="missing are of 3 shards 1; save them first"):
        merge(tmp_path / "d")
    os.rename(tmp_path / "aside", tmp_path / "d.part1-of-3.json")
    with pytest.raises(ValueError, match="consists of 3 shards; join them with fairseq-datastore merge"):
        Datastore.open(tmp_path / "d")
    shards(tmp_path / "d", [6, 6])
    with pytest.raises(ValueError, match="consists of 2 and 3 shards; remove the stale shards"):
        merge(tmp_path / "d")
    with pytest.raises(ValueError, match="nothing to join; name the stores"):
        merge(tmp_path / "nothing")


def test_shards_of_different_texts_are_rejected(tmp_path):
    shards(tmp_path / "d", [3, 4])
    about = json.loads((tmp_path / "d.part1-of-2.json").read_text())
    (tmp_path / "d.part1-of-2.json").write_text(json.dumps(about | {"first_row": 7}))
    with pytest.raises(ValueError, match="begins at row 7 of the store, and the shards before it hold 3"):
        join_shards(tmp_path / "d", 2)
    (tmp_path / "d.part1-of-2.json").write_text(json.dumps(about | {"context_window": 3}))
    join_shards(tmp_path / "d", 2)  # facts that one shard lacks are not compared
    (tmp_path / "d.part1-of-2.json").write_text(json.dumps(about | {"model_digest": "n" * 20}))
    with pytest.raises(ValueError, match="model_digest is 'mmmmmmmmmmmmmmmmmmmm' in the first and 'nnnn"):
        join_shards(tmp_path / "d", 2)


def test_stores_are_concatenated_without_copying(tmp_path):
    a, b = save(tmp_path / "a", 5, documents=(2, 3)), save(tmp_path / "x" / "b", 4, seed=1, documents=(4,))
    c = save(tmp_path / "c", 2, seed=2)
    delete(tmp_path / "a", np.array([1]))
    arrays = set(tmp_path.rglob("*_*.npy"))
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "x" / "b"])
    delete(tmp_path / "ab", np.array([6]))
    merge(tmp_path / "x" / "all", [tmp_path / "ab", tmp_path / "c"])
    assert set(tmp_path.rglob("*_*.npy")) == arrays
    store = Datastore.open(tmp_path / "x" / "all")
    np.testing.assert_array_equal(store.keys, np.concatenate([a[0], b[0], c[0]]))
    np.testing.assert_array_equal(store.values, np.concatenate([a[1], b[1], c[1]]))
    np.testing.assert_array_equal(store.where(np.arange(11))[0], [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(store.where(np.arange(11))[1], [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1])
    assert store.deleted.tolist() == [1, 6]
    assert (store.num_alive, store.metadata["num_documents"]) == (9, 4)
    assert store.context(np.array([0, 5, 10]), before=1, after=2).tolist() == [
        [-1, a[1][0], -1, -1],  # row 1 is deleted, row 2 is of another document
        [-1, b[1][0], -1, b[1][2]],
        [c[1][0], c[1][1], -1, -1],
    ]
    delete(tmp_path / "c", np.array([0]))  # of a part: at once in the whole
    assert Datastore.open(tmp_path / "x" / "all").deleted.tolist() == [1, 6, 9]
    moved = tmp_path / "elsewhere"
    os.rename(tmp_path / "x", moved)
    with pytest.raises(ValueError, match=r"lists the shard '.*b', and .*b.json is missing; copy it too"):
        Datastore.open(tmp_path / "ab")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"key_tap": "model_output"}, "key_tap is 'last_ffn_input' in the first and 'model_output' in the second"),
        ({"dictionary_digest": "e" * 64}, "dictionary_digest is 'd{26}...' in the first and 'e{26}...' in the"),
        ({"model_digest": "n"}, "model_digest is"),
        ({"dtype": "float16"}, "key_dtype is 'float32' in the first and 'float16' in the second; .* convert --dtype"),
    ],
)
def test_stores_that_do_not_fit_are_rejected(tmp_path, about, message):
    save(tmp_path / "a", 5)
    save(tmp_path / "b", 5, **about)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "ab.json").exists()


def test_widths_that_differ_are_rejected(tmp_path):
    save(tmp_path / "a", 5)
    with DatastoreWriter(tmp_path / "b", 5, DIM + 1, metadata=META) as writer:
        writer.append(np.ones((5, DIM + 1), np.float32), np.ones(5, np.int64))
        writer.finish()
    with pytest.raises(ValueError, match="dim is 4 in the first and 5 in the second"):
        merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="is that of a store with arrays of its own; choose another name"):
        merge(tmp_path / "a", [tmp_path / "b"])


def test_a_part_that_was_saved_again_is_seen(tmp_path):
    save(tmp_path / "a", 5)
    save(tmp_path / "b", 5, seed=1)
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    delete(tmp_path / "ab", np.array([7]))
    digest = Datastore.open(tmp_path / "ab").digest
    save(tmp_path / "b", 6, seed=1)
    with pytest.raises(ValueError, match="holds 6 rows other than the 5 that .*ab.json lists: it was rewritten"):
        Datastore.open(tmp_path / "ab")
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    store = Datastore.open(tmp_path / "ab")
    assert (len(store), store.deleted.tolist()) == (11, [])  # what was deleted were rows of another content
    assert store.digest != digest


@pytest.mark.parametrize("array", ["_keys.npy", "_vals.npy", "_docs.npy"])
def test_a_flipped_byte_of_any_part_is_named(tmp_path, monkeypatch, array):
    monkeypatch.setattr("fairseq.runtime.files.BLOCK_BYTES", 64)
    monkeypatch.setattr("fairseq.memory.datastore.writer.BLOCK_BYTES", 64)
    shards(tmp_path / "d", [9, 20, 9])
    join_shards(tmp_path / "d", 3)
    Datastore.open(tmp_path / "d").verify()
    path = tmp_path / f"d.part1-of-3{array}"
    content = bytearray(path.read_bytes())
    content[135] ^= 4
    path.write_bytes(content)
    message = r": the block of bytes 128 to \d+ differs from what was saved \(byte 135 if only one does\)"
    with pytest.raises(ValueError, match=f"d.part1-of-3{array}{message}"):
        Datastore.open(tmp_path / "d").verify()


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_deleted_rows_are_listed_and_compacted_away(tmp_path_factory, data):
    prefix = tmp_path_factory.mktemp("delete") / "d"
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    keys, values = shards(prefix, sizes)
    join_shards(prefix, len(sizes))
    total, digest = sum(sizes), Datastore.open(prefix).digest
    gone: set[int] = set()
    for _ in range(2):
        chosen = data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1))
        if len(gone | chosen) < total:
            done = delete(prefix, np.array(list(chosen), dtype=np.int64))
            assert done.new == len(chosen - gone)
            gone |= chosen
    store = Datastore.open(prefix)
    assert store.deleted.tolist() == sorted(gone)
    assert store.deleted.dtype == np.int64
    assert (store.num_alive, len(store), store.digest) == (total - len(gone), total, digest)
    np.testing.assert_array_equal(store.keys, keys)
    left = [row for row in range(total) if row not in gone]
    assert compact(prefix).rows == len(left)
    store = Datastore.open(prefix)
    np.testing.assert_array_equal(store.keys, keys[left])
    np.testing.assert_array_equal(store.values, values[left])
    np.testing.assert_array_equal(store.where(np.arange(len(left))), [np.zeros(len(left)), left])
    assert not len(store.deleted)
    assert (store.digest != digest) == bool(gone)
    store.verify()
    if gone:
        names = {path.name for path in prefix.parent.iterdir()}
        assert names == {"d.json", "d_keys.npy", "d_vals.npy", "d_docs.npy"}


def test_deleting_documents(tmp_path):
    save(tmp_path / "d", 9, documents=(2, 3, 4))
    assert delete(tmp_path / "d", documents=[1]).new == 3
    assert Datastore.open(tmp_path / "d").deleted.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="document 3 has no row in datastore .*, whose documents are 0 to 2"):
        delete(tmp_path / "d", documents=[0, 3])
    with pytest.raises(ValueError, match="all 9 rows of datastore .* would be deleted; remove its files instead"):
        delete(tmp_path / "d", documents=[0, 2])
    for row in (-1, 9):
        with pytest.raises(ValueError, match=f"row {row} is not in datastore .*, whose rows are 0 to 8; none is"):
            delete(tmp_path / "d", np.array([0, row]))
    assert Datastore.open(tmp_path / "d").deleted.tolist() == [2, 3, 4]
    save(tmp_path / "plain", 4)
    with pytest.raises(ValueError, match="does not record the documents of its rows; give --rows"):
        delete(tmp_path / "plain", documents=[0])


def test_a_deletion_that_was_killed_counts(tmp_path, monkeypatch):
    save(tmp_path / "d", 9)
    delete(tmp_path / "d", np.array([2]))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fairseq.memory.datastore.delete.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            delete(tmp_path / "d", np.array([5]))
    assert Datastore.open(tmp_path / "d").deleted.tolist() == [2, 5]
    delete(tmp_path / "d", np.array([0]))
    assert json.loads((tmp_path / "d.json").read_text())["deleted"] == 3
    np.save(tmp_path / "d.deleted.npy", np.array([0, 2]))
    with pytest.raises(ValueError, match=r"d.deleted.npy holds \(2,\) int64, not the 3 or more deleted rows of 9"):
        Datastore.open(tmp_path / "d")
    (tmp_path / "d.deleted.npy").unlink()
    with pytest.raises(ValueError, match="3 rows of datastore .* are deleted, and .*d.deleted.npy is missing"):
        Datastore.open(tmp_path / "d")


def test_what_was_deleted_ends_with_the_store(tmp_path):
    save(tmp_path / "d", 9)
    delete(tmp_path / "d", np.array([2]))
    save(tmp_path / "d", 9)
    assert not len(Datastore.open(tmp_path / "d").deleted)


def test_one_writer_at_a_time(tmp_path):
    save(tmp_path / "d", 9)
    save(tmp_path / "e", 9)
    with locked(tmp_path / "d.lock", "x"):
        for work in (
            lambda: delete(tmp_path / "d", np.array([1])),
            lambda: merge(tmp_path / "d", [tmp_path / "e"]),
            lambda: join_shards(tmp_path / "d", 2),
        ):
            with pytest.raises(OSError, match="another process is writing datastore"):
                work()
    delete(tmp_path / "d", np.array([1]))
    with locked(tmp_path / "d.lock", "x"), pytest.raises(OSError, match="another process"):
        compact(tmp_path / "d")
    assert Datastore.open(tmp_path / "d").deleted.tolist() == [1]


@pytest.mark.parametrize("kill_at", range(12))
def test_a_compaction_that_is_killed_goes_on(tmp_path, monkeypatch, kill_at):
    keys, values = shards(tmp_path / "d", [5, 6])
    join_shards(tmp_path / "d", 2)
    delete(tmp_path / "d", np.array([0, 7]))
    with dies_at_event(monkeypatch, kill_at):
        compact(tmp_path / "d")
    compact(tmp_path / "d")
    store = Datastore.open(tmp_path / "d")
    left = [row for row in range(11) if row not in (0, 7)]
    np.testing.assert_array_equal(store.keys, keys[left])
    np.testing.assert_array_equal(store.values, values[left])
    assert not len(store.deleted)
    store.verify()

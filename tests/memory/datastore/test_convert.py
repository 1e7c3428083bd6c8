"""Converted and sampled stores against numpy's own conversion and choice of rows."""

import json

import numpy as np
import pytest
import torch
from store_making import DIM, META, rows, save

from fairseq.memory.datastore.convert import convert, nonfinite_rows, sample
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.info import count_keys, describe
from fairseq.memory.datastore.merge import merge
from fairseq.memory.datastore.writer import DatastoreWriter


def as_type(keys: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(keys).to(getattr(torch, dtype)).float().numpy()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("fairseq.memory.datastore.convert._BLOCK_BYTES", 4 * DIM * 7)


@pytest.mark.parametrize("to", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_keys_in_another_type(tmp_path, of, to):
    keys, values = save(tmp_path / "a", 30, dtype=of, documents=(10, 20))
    delete(tmp_path / "a", np.array([3, 12]))
    done = convert(Datastore.open(tmp_path / "a"), tmp_path / "b", to, {}, drop=False)
    left = np.delete(np.arange(30), [3, 12])
    assert (done.rows, done.dropped, done.nonfinite) == (28, 2, 0)
    store = Datastore.open(tmp_path / "b")
    assert store.keys.dtype == to
    np.testing.assert_array_equal(store.take_keys(np.arange(28)), as_type(as_type(keys, of), to)[left])
    np.testing.assert_array_equal(store.values, values[left])
    document = np.repeat([0, 1], [9, 19])
    np.testing.assert_array_equal(store.where(np.arange(28)), [document, left - 10 * document])
    assert store.context(np.array([3]), before=1, after=1).tolist() == [[-1, values[4], values[5]]]  # row 3 is gone
    assert {name: store.metadata[name] for name in META} == META
    store.verify()


def test_several_parts_become_one_file(tmp_path):
    a, b = save(tmp_path / "a", 9), save(tmp_path / "b", 8, seed=1)
    merge(tmp_path / "ab", [tmp_path / "a", tmp_path / "b"])
    convert(Datastore.open(tmp_path / "ab"), tmp_path / "one", "float32", {}, drop=False)
    assert (tmp_path / "one_keys.npy").read_bytes() == np.concatenate([a[0], b[0]]).tobytes()
    assert (tmp_path / "one_vals.npy").read_bytes() == np.concatenate([a[1], b[1]]).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_that_are_not_finite_are_counted_and_rejected_or_dropped(tmp_path, dtype):
    keys, values = rows(30)
    keys[4, 1], keys[11, 0], keys[12] = np.nan, np.inf, -np.inf
    keys[20, 2] = 1e6  # infinite in float16 alone
    bad = [4, 11, 12, 20] if dtype == "float16" else [4, 11, 12]
    keys.tofile(tmp_path / "d_keys.npy")
    values.tofile(tmp_path / "d_vals.npy")
    store = Datastore.open(tmp_path / "d", StoreHints(dim=DIM))
    assert nonfinite_rows(store.keys, dtype).tolist() == bad
    with pytest.raises(
        ValueError, match=f"{len(bad)} of the 30 keys of .* hold NaN or infinity as {dtype}; drop them with --drop-"
    ):
        convert(store, tmp_path / "x", dtype, {}, drop=False)
    assert not (tmp_path / "x.json").exists()
    done = convert(store, tmp_path / "x", dtype, {}, drop=True)
    assert (done.rows, done.nonfinite) == (30 - len(bad), len(bad))
    left = np.delete(np.arange(30), bad)
    made = Datastore.open(tmp_path / "x")
    np.testing.assert_array_equal(made.take_keys(np.arange(len(left))), as_type(keys[left], dtype))
    np.testing.assert_array_equal(made.where(np.arange(len(left)))[1], left)  # places in the store it was made of
    assert made.metadata["nonfinite_dropped"] == len(bad)


def test_a_conversion_goes_on_and_is_not_repeated(tmp_path, monkeypatch, caplog):
    save(tmp_path / "a", 40)
    store = Datastore.open(tmp_path / "a")
    convert(store, tmp_path / "whole", "float16", {}, drop=False)
    monkeypatch.setattr("fairseq.memory.datastore.writer.SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    plain, calls = DatastoreWriter.append, []

    def append(self, keys, values):
        calls.append(len(values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(self, keys, values)

    with monkeypatch.context() as patch:
        patch.setattr("fairseq.memory.datastore.writer.DatastoreWriter.append", append)
        with pytest.raises(KeyboardInterrupt):
            convert(store, tmp_path / "b", "float16", {}, drop=False)
        calls.append(0)
        convert(store, tmp_path / "b", "float16", {}, drop=False)
    assert sum(calls[4:]) == 40 - sum(calls[:2])
    for end in ("-fp16_keys.npy", "_vals.npy"):
        assert (tmp_path / f"b{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    written = (tmp_path / "b.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        convert(store, tmp_path / "b", "float16", {}, drop=False)
    assert "is complete already" in caplog.text
    assert (tmp_path / "b.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="b.json is that of another datastore; choose another name"):
        convert(store, tmp_path / "b", "float32", {}, drop=False)


@pytest.mark.parametrize("count", [1, 13, 26])
def test_a_sample_is_of_rows_that_are_left(tmp_path, count):
    keys, values = save(tmp_path / "a", 30, dtype="bfloat16")
    gone = [0, 1, 17, 29]
    delete(tmp_path / "a", np.array(gone))
    store = Datastore.open(tmp_path / "a")
    for name, seed in (("s", 1), ("again", 1), ("other", 2)):
        sample(store, tmp_path / name, count, seed)
    made = Datastore.open(tmp_path / "s")
    drawn = made.where(np.arange(count))[1]
    assert len(set(drawn.tolist()) - set(gone)) == len(made) == count
    assert drawn.tolist() == sorted(drawn)
    np.testing.assert_array_equal(made.take_keys(np.arange(count)), as_type(keys, "bfloat16")[drawn])
    np.testing.assert_array_equal(made.values, values[drawn])
    assert made.digest == Datastore.open(tmp_path / "again").digest
    assert count == 26 or made.digest != Datastore.open(tmp_path / "other").digest
    with pytest.raises(ValueError, match="--rows 27: datastore .* has 26 rows to draw from"):
        sample(store, tmp_path / "x", 27, 1)


def test_every_row_is_drawn_alike(tmp_path):
    save(tmp_path / "a", 12)
    delete(tmp_path / "a", np.array([2, 3, 7]))
    store = Datastore.open(tmp_path / "a")
    counts = np.zeros(12)
    for seed in range(60):
        sample(store, tmp_path / f"s{seed}", 3, seed)
        counts[Datastore.open(tmp_path / f"s{seed}").where(np.arange(3))[1]] += 1
    assert (counts == 0).nonzero()[0].tolist() == [2, 3, 7]
    assert counts.max() < 40  # 20 are expected


def test_what_is_reported_of_a_store(tmp_path):
    save(tmp_path / "a", 30, documents=(10, 20))
    delete(tmp_path / "a", np.array([3]))
    summary = describe(Datastore.open(tmp_path / "a"))
    expected = {"rows": 30, "deleted": 1, "alive": 29, "dim": DIM, "key_dtype": "float32", "bytes": 30 * (4 * DIM + 8)}
    assert expected.items() <= summary.items()
    assert summary["num_documents"] == 2
    assert summary["key_tap"] == "last_ffn_input"
    assert json.dumps(summary)
    counts = count_keys(Datastore.open(tmp_path / "a").keys)
    assert (counts.nonfinite, counts.zero) == (0, 0)
    keys, values = rows(30)
    keys[20:], keys[3, 1], keys[4, 0] = 0, np.nan, -np.inf
    keys.tofile(tmp_path / "d_keys.npy")
    values.tofile(tmp_path / "d_vals.npy")
    counts = count_keys(Datastore.open(tmp_path / "d", StoreHints(dim=DIM)).keys)
    assert (counts.nonfinite, counts.zero) == (2, 10)

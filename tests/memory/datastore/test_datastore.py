"""Stores written and read back, checked against arrays made by numpy alone."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import dies_at_event

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.runtime.files import BlockChecksums, locked

DIM = 8
META = {"key_tap": "last_ffn_input", "dictionary_digest": "d" * 64, "dictionary_size": 50, "context_window": 4}


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, DIM), dtype=np.float32), rng.integers(0, 50, n)


def save(prefix: Path, n: int = 100, dtype: str = "float32", step: int = 7, **more) -> tuple[np.ndarray, np.ndarray]:
    keys, values = rows(n)
    with DatastoreWriter(prefix, n, DIM, dtype, META, **more) as writer:
        for i in range(writer.rows_done, n, step):
            writer.append(keys[i : i + step], values[i : i + step])
        writer.finish()
    return keys, values


TYPES = [("float32", "_keys.npy"), ("float16", "-fp16_keys.npy"), ("bfloat16", "-bf16_keys.npy")]


@pytest.mark.parametrize(("dtype", "ending"), TYPES)
def test_what_is_written_is_headerless_row_major_and_describes_itself(tmp_path, dtype, ending):
    prefix = tmp_path / "dstore"
    keys, values = save(prefix, dtype=dtype)
    typed = torch.from_numpy(keys).to(getattr(torch, dtype))
    assert Path(f"{prefix}{ending}").read_bytes() == typed.view(torch.uint8).numpy().tobytes()
    assert Path(f"{prefix}_vals.npy").read_bytes() == values.astype(np.int64).tobytes()
    store = Datastore.open(prefix)
    assert (len(store), store.dim, store.keys.dtype) == (100, DIM, dtype)
    np.testing.assert_array_equal(store.values, values)
    assert store.metadata["key_tap"] == "last_ffn_input"
    store.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["dstore.json", "dstore_vals.npy", "dstore" + ending])


def test_torch_rows_of_any_precision(tmp_path):
    keys, values = rows(6)
    with DatastoreWriter(tmp_path / "s", 6, DIM, "float16", {}) as writer:
        writer.append(torch.from_numpy(keys[:3]).bfloat16(), torch.from_numpy(values[:3]))
        writer.append(torch.from_numpy(keys[3:]).half(), torch.from_numpy(values[3:]).int())
        writer.finish()
    store = Datastore.open(tmp_path / "s")
    np.testing.assert_array_equal(store.keys.block(0, 3), torch.from_numpy(keys[:3]).bfloat16().half().numpy())
    np.testing.assert_array_equal(store.values, values)


def test_take_keys_keeps_the_order_asked_for(tmp_path):
    keys, _ = save(tmp_path / "s", dtype="float16")
    ids = np.array([5, 99, 5, 0, 42])
    taken = Datastore.open(tmp_path / "s").take_keys(ids)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, keys.astype(np.float16)[ids].astype(np.float32))


@pytest.mark.parametrize("fp16", [False, True])
def test_headerless_files_of_trime(tmp_path, fp16):
    keys, values = rows(20)
    name = "d-fp16_keys.npy" if fp16 else "d_keys.npy"
    keys.astype(np.float16 if fp16 else np.float32).tofile(tmp_path / name)
    values.astype(np.int64).tofile(tmp_path / "d_vals.npy")
    for size in (20, None):
        store = Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=size, fp16=fp16))
        assert len(store) == 20
        np.testing.assert_array_equal(store.values, values)
        store.require(dim=DIM, size=20, dictionary_size=50, dictionary_digest="x", key_tap="model_output")


def test_values_of_16_bits_wrap_and_are_rejected_for_a_larger_dictionary(tmp_path):
    """kNN-LM's float16 stores keep tokens as int16 (fault of the original)."""
    keys, _ = rows(4)
    keys.astype(np.float16).tofile(tmp_path / "k_keys.npy")
    np.array([1, 2, 40_000, 3]).astype(np.int16).tofile(tmp_path / "k_vals.npy")
    store = Datastore.open(tmp_path / "k", StoreHints(dim=DIM, size=4, fp16=True))
    assert store.values.dtype == "int16"
    with pytest.raises(ValueError, match=r"int16, which wraps above 32767, and the dictionary has 50000 types"):
        store.require(dictionary_size=50_000)
    with pytest.raises(ValueError, match=r"tokens -25536 to 3, the dictionary has 30000 types"):
        store.require(dictionary_size=30_000)
    np.array([1, 2, 4, 3]).astype(np.int16).tofile(tmp_path / "k_vals.npy")
    Datastore.open(tmp_path / "k", StoreHints(dim=DIM, size=4, fp16=True)).require(dictionary_size=32_000)


def test_headerless_sizes_are_checked_before_any_work(tmp_path):
    keys, values = rows(20)
    keys.tofile(tmp_path / "d_keys.npy")
    values.astype(np.int64).tofile(tmp_path / "d_vals.npy")
    with pytest.raises(ValueError, match=r"holds 640 bytes; 21 rows of 8 float32 values take 672.*it holds 20 rows"):
        Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=21))
    with pytest.raises(ValueError, match=r"d_keys.npy holds 640 bytes; 20 rows of 9 float32 values take 720"):
        Datastore.open(tmp_path / "d", StoreHints(dim=9, size=20))
    with pytest.raises(ValueError, match="drop --dstore-fp16"):
        Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=20, fp16=True))
    keys.astype(np.float16).tofile(tmp_path / "d_keys.npy")
    with pytest.raises(ValueError, match="add --dstore-fp16"):
        Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=20))
    keys.tofile(tmp_path / "d_keys.npy")
    values[:11].astype(np.int64).tofile(tmp_path / "d_vals.npy")
    with pytest.raises(ValueError, match="d_vals.npy holds 88 bytes; 20 values take 160 as int64, 80 as int32"):
        Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=20))


def test_rows_of_zeros_at_the_end_are_reported(tmp_path, caplog):
    keys, values = rows(20)
    keys[15:] = 0
    keys.tofile(tmp_path / "d_keys.npy")
    values.astype(np.int64).tofile(tmp_path / "d_vals.npy")
    Datastore.open(tmp_path / "d", StoreHints(dim=DIM, size=20))
    assert "the last key of" in caplog.text


def test_requirements_name_both_values(tmp_path):
    save(tmp_path / "s")
    store = Datastore.open(tmp_path / "s")
    assert store.require(dim=DIM, size=100, key_tap="last_ffn_input", dictionary_digest="d" * 64, dictionary_size=50)
    with pytest.raises(ValueError, match="keys of width 8; the model makes 16"):
        store.require(dim=16)
    with pytest.raises(ValueError, match="has 100 rows; --dstore-size says 99"):
        store.require(size=99)
    with pytest.raises(ValueError, match="holds keys of last_ffn_input; --knn-keytype says model_output"):
        store.require(key_tap="model_output")
    with pytest.raises(ValueError, match="another dictionary .50 types"):
        store.require(dictionary_digest="e" * 64, dictionary_size=60)


def test_missing_incomplete_truncated_and_foreign_stores(tmp_path):
    with pytest.raises(ValueError, match="no datastore at"):
        Datastore.open(tmp_path / "nothing")
    save(tmp_path / "s")
    with pytest.raises(ValueError, match="holds float32 keys and --dstore-fp16 was given"):
        Datastore.open(tmp_path / "s", StoreHints(fp16=True))
    with open(tmp_path / "s_keys.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"s_keys.npy holds 1000 bytes; 100 rows of float32 take 3200"):
        Datastore.open(tmp_path / "s")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Datastore.open(tmp_path / "s")
    (tmp_path / "s.json").write_text('{"format_version": 1, "rows": 0}')
    with pytest.raises(ValueError, match="lacks 'complete'"):
        Datastore.open(tmp_path / "s")
    (tmp_path / "s.json").write_text('{"format_version": 9}')
    with pytest.raises(ValueError, match="format version 9"):
        Datastore.open(tmp_path / "s")
    (tmp_path / "s.json").unlink()
    with pytest.raises(ValueError, match="has no metadata"):
        Datastore.open(tmp_path / "s")


def test_an_empty_store_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        DatastoreWriter(tmp_path / "s", 0, DIM)
    (tmp_path / "d_keys.npy").touch()
    (tmp_path / "d_vals.npy").touch()
    with pytest.raises(ValueError, match="the store is empty"):
        Datastore.open(tmp_path / "d", StoreHints(dim=DIM))


def test_a_flipped_byte_is_found(tmp_path):
    save(tmp_path / "s")
    with open(tmp_path / "s_keys.npy", "r+b") as file:
        file.seek(500)
        file.write(b"\x7f")
    message = r"s_keys.npy: the block of bytes 0 to 3199 differs from what was saved \(byte 500 if only one does\)"
    with pytest.raises(ValueError, match=message):
        Datastore.open(tmp_path / "s").verify()


def test_block_checksums_do_not_depend_on_how_the_bytes_come(monkeypatch):
    monkeypatch.setattr("fairseq.runtime.files.BLOCK_BYTES", 64)
    data = memoryview(os.urandom(300))
    whole, parts = BlockChecksums(), BlockChecksums()
    whole.update(data)
    for i in range(0, 300, 17):
        parts = BlockChecksums(json.loads(json.dumps(parts.state())))
        parts.update(data[i : i + 17])
    assert whole.digests() == parts.digests()
    assert len(whole.digests()) == 5


def test_wrong_rows_are_rejected(tmp_path):
    keys, values = rows(10)
    with DatastoreWriter(tmp_path / "s", 10, DIM, "float16", {}) as writer:
        with pytest.raises(ValueError, match="do not make rows of width 8"):
            writer.append(keys[:, :4], values)
        with pytest.raises(ValueError, match="1 of the keys .*too large for float16"):
            writer.append(np.where(np.arange(10)[:, None] == 3, 1e6, keys), values)
        writer.append(keys[:6], values[:6])
        with pytest.raises(ValueError, match="announced with 10 rows; 6 are written and 10 more were appended"):
            writer.append(keys, values)
        with pytest.raises(ValueError, match="has 6 of the 10 announced rows"):
            writer.finish()
    assert not (tmp_path / "s.json").exists()


def test_resume_goes_on_after_the_last_checkpoint(tmp_path):
    keys, values = rows(100)
    writer = DatastoreWriter(tmp_path / "s", 100, DIM, metadata=META)
    writer.append(keys[:30], values[:30])
    writer.checkpoint({"batch": 3})
    writer.append(keys[30:50], values[30:50])  # lost: no checkpoint follows
    writer.close()
    with pytest.raises(ValueError, match=r"is not complete \(30 of 100 rows\); resume with the same command"):
        Datastore.open(tmp_path / "s")
    with DatastoreWriter(tmp_path / "s", 100, DIM, metadata=META) as writer:
        assert (writer.rows_done, writer.cursor) == (30, {"batch": 3})
        writer.append(keys[30:], values[30:])
        writer.finish()
    store = Datastore.open(tmp_path / "s")
    np.testing.assert_array_equal(store.keys, keys)
    store.verify()


def test_leftovers_of_another_command_are_thrown_away_with_a_warning(tmp_path, caplog):
    keys, values = rows(100)
    with DatastoreWriter(tmp_path / "s", 100, DIM, metadata=META) as writer:
        writer.append(keys[:30], values[:30])
        writer.checkpoint()
    with DatastoreWriter(tmp_path / "s", 90, DIM, "float16", META) as writer:
        assert writer.rows_done == 0
    assert "another command left 30 rows unfinished" in caplog.text
    with DatastoreWriter(tmp_path / "s", 100, DIM, metadata=META) as writer:
        writer.append(keys[:30], values[:30])
        writer.checkpoint()
    with DatastoreWriter(tmp_path / "s", 100, DIM, metadata=META, resume=False) as writer:
        assert writer.rows_done == 0


def test_an_existing_store_is_replaced_only_at_the_end(tmp_path):
    old, _ = save(tmp_path / "s")
    new, values = rows(60, seed=1)
    with DatastoreWriter(tmp_path / "s", 60, DIM, metadata=META) as writer:
        writer.append(new, values)
        writer.checkpoint()
        np.testing.assert_array_equal(Datastore.open(tmp_path / "s").keys, old)
        writer.finish()
    np.testing.assert_array_equal(Datastore.open(tmp_path / "s").keys, new)


@pytest.mark.parametrize("kill_at", range(7))
def test_a_kill_between_the_renames_is_repaired(tmp_path, monkeypatch, kill_at):
    """Every rename and removal of finish() is a place to die at."""
    save(tmp_path / "s", 40)
    keys, values = rows(60, seed=1)
    writer = DatastoreWriter(tmp_path / "s", 60, DIM, metadata=META)
    writer.append(keys, values)
    with dies_at_event(monkeypatch, kill_at, aside=("s.progress.json.",)):
        writer.finish()
    writer.close()
    with DatastoreWriter(tmp_path / "s", 60, DIM, metadata=META) as writer:
        writer.append(keys[writer.rows_done :], values[writer.rows_done :])
        writer.finish()
    store = Datastore.open(tmp_path / "s")
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.values, values)
    store.verify()


def test_two_writers_at_once(tmp_path):
    with DatastoreWriter(tmp_path / "s", 10, DIM) as first:
        with pytest.raises(OSError, match="another process is writing datastore"):
            DatastoreWriter(tmp_path / "s", 10, DIM)
        first.append(*rows(10))
        first.finish()
    with locked(tmp_path / "s.lock", "x"):
        pass
    assert not (tmp_path / "s.lock").exists()


def test_no_space_is_reported_before_the_first_row(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"needs 40000 more bytes, .* has 1000 free"):
        DatastoreWriter(tmp_path / "s", 1000, DIM)
    assert not list(tmp_path.iterdir())


def write_slowly(prefix, started):
    keys, values = rows(3000)
    with DatastoreWriter(prefix, 3000, DIM, "float32", META) as writer:
        start = (writer.cursor or {"row": 0})["row"]
        started.set()
        for i in range(start, 3000, 10):
            writer.append(keys[i : i + 10], values[i : i + 10])
            time.sleep(0.001)
            if i % 70 == 0:
                writer.checkpoint({"row": i + 10})
        writer.finish()


def test_kill_at_random_points_gives_the_same_bytes(tmp_path):
    fork = multiprocessing.get_context("fork")  # starting Python again would take most of the time
    delays = np.random.default_rng().uniform(0.0, 0.3, 8)
    for delay in delays:
        started = fork.Event()
        process = fork.Process(target=write_slowly, args=(tmp_path / "s", started))
        process.start()
        started.wait(20)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    write_slowly(tmp_path / "s", fork.Event())
    keys, values = rows(3000)
    assert (tmp_path / "s_keys.npy").read_bytes() == keys.tobytes(), delays
    assert (tmp_path / "s_vals.npy").read_bytes() == values.tobytes(), delays
    Datastore.open(tmp_path / "s").verify()


def test_the_golden_sample_opens_in_both_layouts():
    golden = os.environ.get("FAIRSEQ_GOLDEN")
    if not golden:
        pytest.skip("FAIRSEQ_GOLDEN is not set")
    prefix = Path(golden) / "trime" / "dstore-sample" / "dstore"
    full = Datastore.open(prefix, StoreHints(dim=128, size=2048))
    half = Datastore.open(prefix, StoreHints(dim=128, size=2048, fp16=True))
    np.testing.assert_allclose(full.keys, np.asarray(half.keys, np.float32), atol=4e-3)
    full.require(dictionary_size=17_551)

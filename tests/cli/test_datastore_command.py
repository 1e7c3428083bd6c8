"""fairseq-datastore as its users see it: what each command prints, and mistakes told in one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.sharded import opening
from fairseq.memory.planning.estimate import IndexRates, Rates
from fairseq_cli import datastore
from fairseq_cli.entry import run

DIM, ROWS = 4, 30
KEYS = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
VALUES = np.arange(ROWS) % 7


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 30 rows in three documents of 10."""
    runs = np.array([[10 * number, number, 0] for number in range(3)])
    about = {"key_tap": "last_ffn_input", "num_documents": 3, "subset": "train"}
    with DatastoreWriter(tmp_path / "d", ROWS, DIM, metadata=about, documents=runs) as writer:
        writer.append(KEYS, VALUES)
        writer.finish()
    return tmp_path / "d"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    """Run a command; returns what it printed."""

    def call(*words: object) -> str:
        capsys.readouterr()
        run(datastore.PROGRAM, datastore.main, [str(word) for word in words])
        return capsys.readouterr().out

    return call


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; returns its one line."""

    def fails(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(datastore.PROGRAM, datastore.main, [str(word) for word in words])
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        assert "Traceback" not in lines[0]
        return lines[0]

    return fails


def test_info(said, store):
    lines = said("info", store).splitlines()
    assert {"rows: 30", "deleted: 0", "dim: 4", "key_tap: last_ffn_input", "num_documents: 3"} <= set(lines)
    as_json = json.loads(said("info", store, "--json"))
    assert as_json["rows"] == 30
    assert as_json["digest"] == Datastore.open(store).digest
    assert [part["rows"] for part in as_json["parts"]] == [30]


def test_files_of_other_programs(said, told, tmp_path):
    KEYS.astype(np.float16).tofile(tmp_path / "old_keys.npy")
    VALUES.tofile(tmp_path / "old_vals.npy")
    sizes = ("--dimension", DIM, "--dstore-fp16")
    assert "rows: 30" in said("info", tmp_path / "old", *sizes)
    assert "without checksums (files of another program); 0 keys hold NaN" in said("verify", tmp_path / "old", *sizes)
    assert "has no metadata" in told("info", tmp_path / "old")
    assert "add --dstore-fp16" in told("info", tmp_path / "old", "--dimension", DIM, "--dstore-size", ROWS)
    (tmp_path / "dict.txt").write_text("a 3\nb 2\nc 1\n")
    out = said(
        *("convert", tmp_path / "old", tmp_path / "new", *sizes, "--dtype", "float32"),
        *("--knn-keytype", "last_ffn_input", "--dictionary", tmp_path / "dict.txt"),
    )
    assert out == f"wrote 30 rows to {tmp_path / 'new'}; dropped 0, of which 0 held NaN or infinity\n"
    made = Datastore.open(tmp_path / "new")
    np.testing.assert_array_equal(made.keys, KEYS.astype(np.float16).astype(np.float32))
    assert (made.metadata["key_tap"], made.metadata["dictionary_size"]) == ("last_ffn_input", 7)
    assert json.loads((tmp_path / "new.run.json").read_text())["figures"]["rows"] == 30
    (tmp_path / "dict.txt").write_text("a 3\n")
    words = ("convert", tmp_path / "old", tmp_path / "x", *sizes, "--dictionary", tmp_path / "dict.txt")
    assert "holds tokens 0 to 6, the dictionary has 5 types" in told(*words)


def test_deleting_and_rewriting(said, told, store, tmp_path):
    (tmp_path / "rows.txt").write_text("1\n 4 5\n")
    assert said("delete", store, "--rows", "0,28-29", "--rows-file", tmp_path / "rows.txt", "--documents", "1") == (
        f"deleted 16 rows of {store}; 16 of its 30 rows are deleted now\n"
    )
    assert {"deleted: 16", "alive: 14"} <= set(said("info", store).splitlines())
    assert said("delete", store, "--compact") == f"rewrote {store}: 14 rows; 16 deleted ones are gone\n"
    np.testing.assert_array_equal(Datastore.open(store).values, np.delete(VALUES, [0, 1, 4, 5, *range(10, 20), 28, 29]))
    assert said("delete", store, "--compact") == f"rewrote {store}: 14 rows; 0 deleted ones are gone\n"
    assert "document 1 has no row" in told("delete", store, "--documents", "1")


def test_sampling_and_merging(said, store, tmp_path):
    assert said("sample", store, tmp_path / "s", "--rows", 5) == f"wrote 5 of 30 rows to {tmp_path / 's'}\n"
    whole = tmp_path / "all"
    assert said("merge", whole, store, tmp_path / "s") == f"{whole}: 35 rows in 2 parts\n"
    assert "part: " in said("info", whole)
    assert "35 rows in 2 parts, 840 bytes: every block is as it was saved; 0 keys" in said("verify", whole)


def test_what_is_damaged_is_named(told, store, capsys):
    path = Path(f"{store}_keys.npy")
    content = bytearray(path.read_bytes())
    content[41] ^= 1
    path.write_bytes(content)
    line = told("verify", store)
    assert f"{path}: the block of bytes 0 to 479 differs from what was saved (byte 41 if only one does)" in line
    path.write_bytes(content[:-4])
    assert "d_keys.npy holds 476 bytes; 30 rows of float32 take 480: it is truncated" in told("verify", store)


def test_keys_that_are_not_finite_are_told(told, tmp_path):
    keys = KEYS.copy()
    keys[3:5] = np.nan
    keys.tofile(tmp_path / "n_keys.npy")
    VALUES.tofile(tmp_path / "n_vals.npy")
    assert "2 keys of datastore" in told("verify", tmp_path / "n", "--dimension", DIM)
    words = ("convert", tmp_path / "n", tmp_path / "m", "--dimension", DIM)
    assert "2 of the 30 keys" in told(*words)
    run(datastore.PROGRAM, datastore.main, [str(word) for word in (*words, "--drop-nonfinite")])
    assert len(Datastore.open(tmp_path / "m")) == 28


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mrge", "x"), "unknown command 'mrge' (did you mean 'merge'?)"),
        (("info",), "fairseq-datastore info: error: the following arguments are required: prefix"),
        (("info", "nowhere"), "no datastore at 'nowhere'"),
        (("info", "{store}", "--dstore-size", "7"), "has 30 rows; --dstore-size says 7"),
        (("info", "{store}", "--dstore-bf16"), "holds float32 keys and --dstore-bf16 was given"),
        (("info", "{store}", "--dstore-bf16", "--dstore-fp16"), "exclude each other"),
        (("info", "{store}", "--dimension", "0"), "--dimension must be at least 1, got 0"),
        (("convert", "{store}"), "the following arguments are required: out"),
        (("convert", "{store}", "{store}x", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("convert", "{store}", "{store}x", "--knn-keytype", "model_output"), "holds keys of last_ffn_input"),
        (("convert", "{store}", "{store}x", "--dictionary", "nowhere.txt"), "nowhere.txt"),
        (("convert", "{store}", "{store}"), "d.json is that of another datastore"),
        (("delete", "{store}"), "give --rows, --rows-file or --documents to delete, or --compact"),
        (("delete", "{store}", "--rows", "3-"), "'3-' is not a row or range of rows; write for example 3,10-20"),
        (("delete", "{store}", "--rows", "9-3"), "'9-3' is not a row or range of rows"),
        (("delete", "{store}", "--rows", "x"), "'x' is not a row or range of rows"),
        (("delete", "{store}", "--rows", "30"), "row 30 is not in datastore"),
        (("delete", "{store}", "--rows", "0-29"), "all 30 rows of datastore"),
        (("delete", "{store}", "--documents", "7"), "document 7 has no row in datastore"),
        (("delete", "{store}", "--documents", "a"), "'a' is not a comma-separated list of integers"),
        (("delete", "{store}", "--rows-file", "nowhere.txt"), "no such file: nowhere.txt"),
        (("delete", "{store}", "--rows-file", __file__), "is no row; give whole numbers"),
        (("sample", "{store}", "{store}x"), "missing --rows"),
        (("sample", "{store}", "{store}x", "--rows", "0"), "--rows must be at least 1, got 0"),
        (("sample", "{store}", "{store}x", "--rows", "31"), "--rows 31: datastore"),
        (("merge", "{store}"), "nothing to join; name the stores"),
        (("merge", "{store}", "{store}"), "choose another name"),
        (("merge", "{store}x", "{store}", "nowhere"), "no datastore at 'nowhere'"),
        (("merge", "/proc/x", "{store}"), "cannot write in '/proc'"),
    ],
)
def test_mistakes(told, store, words, message):
    before = {path.name: path.read_bytes() for path in store.parent.iterdir()}
    assert message in told(*(word.format(store=store) for word in words))
    assert {path.name: path.read_bytes() for path in store.parent.iterdir()} == before


def test_a_full_disk_loses_nothing(told, store, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    assert "has 100 free; free some" in told("convert", store, tmp_path / "x")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert "d.deleted.npy: no space left on the disk" in told("delete", store, "--rows", "3")
    assert "x.json: no space left on the disk" in told("merge", tmp_path / "x", store)
    assert not len(Datastore.open(store).deleted)
    Datastore.open(store).verify()


def test_a_read_only_folder(told, store):
    run(datastore.PROGRAM, datastore.main, ["delete", str(store), "--rows", "5"])
    os.chmod(store.parent, 0o555)
    try:
        for command, *words in (
            ("delete", "--rows", 3),
            ("delete", "--compact"),
            ("convert", f"{store}x"),
            ("sample", f"{store}x", "--rows", 3),
        ):
            assert "it is read-only; choose another folder" in told(command, store, *words)
        assert Datastore.open(store).deleted.tolist() == [5]
    finally:
        os.chmod(store.parent, 0o755)


def test_help_is_light():
    code = """
import sys
import threading
sys.argv.append("--help")
from fairseq_cli import datastore
for words in ([], ["merge", "--help"]):
    try:
        datastore.main(words)
    except SystemExit as end:
        assert end.code == 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in datastore.COMMANDS)
    assert "without any, the shards PREFIX.partI-of-N are joined" in " ".join(done.stdout.split())


def test_plan(said, told, tmp_path, monkeypatch):
    one = IndexRates(train=2.0, train_key=1e-3, add_key=1e-4, scan_key=1e-7, query=1e-5)
    rates = Rates(2e9, 1e9, 1e11, 1e10, 1e-10, 1e-4, {"flat": one, "ivfpq": one})
    monkeypatch.setattr("fairseq.memory.planning.measure.measure", lambda _: rates)
    words = ("plan", "--keys", "103e6", "--dim", 1024, "--folder", tmp_path)
    lines = said(*words).splitlines()
    assert lines[0].startswith("store: 103000000 keys of 1024 float32: 423 GB, written in 7.05 min")
    table = {line.split()[0]: line for line in lines[4:]}
    assert "422 GB!" in table["flat"]
    assert " 7.43 GB " in table["ivfpq"]
    assert table["ivfrabitq"].split()[-3:] == ["-", "-", "-"]
    as_json = json.loads(said(*words, "--json", "--dtype", "float16"))
    assert as_json["store_bytes"] == 103_000_000 * 2056
    assert as_json["config"]["keys"] == 103_000_000
    assert as_json["rates"]["indexes"]["flat"]["scan_key"] == 1e-7
    assert [choice["kind"] for choice in as_json["choices"]][:3] == ["exact", "flat", "ivfpq"]
    assert "'many' is not a whole number" in told("plan", "--keys", "many", "--dim", 4)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert "--folder: " in told(*words[:-1], locked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_its_actors_when_it_is_told_to_stop(store, said, monkeypatch, number):
    ended = []
    actors = SimpleNamespace(end=lambda: ended.append(True))
    monkeypatch.setattr(opening, "serve", lambda *words: ("d", actors, "host:6379"))
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    try:
        lines = said("serve", store).splitlines()
    finally:
        timer.join()
        for each, handler in before.items():
            signal.signal(each, handler)
    assert lines == ["serving d: --search-on ray://host:6379", f"ended {store}"]
    assert ended == [True]

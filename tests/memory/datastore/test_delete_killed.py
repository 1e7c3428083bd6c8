"""Deletions with --compact: killed at every event on a file, repeated, and named by generation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_making import save_keys

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import compact, compacted_by, delete, generation_of, request_digest
from fairseq.memory.datastore.merge import merge
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq_cli import datastore as command

ROOT = Path(__file__).resolve().parents[3]
KEYS = np.arange(240, dtype=np.float32).reshape(60, 4)
LEFT = np.delete(KEYS, [3, *range(10, 21)], axis=0)
WORDS = "delete s --rows 3,10-20 --compact"
# Forks a child for every event, which ends there as by SIGKILL; then the same command runs to its end, twice.
KILLER = """
import os, shutil, signal, sys
import numpy as np
from fairseq.memory.datastore import convert, delete, verify, writer  # imported before the children are forked
from fairseq.memory.datastore.datastore import Datastore
from fairseq_cli import datastore as command

folder, words = sys.argv[1], sys.argv[2].split()
expected = np.load("expected.npy")

def child(at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def hook(event, args):
        nonlocal seen
        writes = event == "open" and str(args[1])[:1] in ("w", "a", "x")
        if writes or event in ("os.rename", "os.remove", "os.truncate"):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    try:
        command.main(words)
    finally:
        sys.stdout.flush()
        os._exit(0)

at = 0
while True:
    at += 1
    shutil.rmtree("work", ignore_errors=True)
    shutil.copytree(folder, "work")
    os.chdir("work")
    status = child(at)
    for again in range(2):
        assert child(0) == 0
        store = Datastore.open("s")
        assert np.array_equal(store.keys, expected), (at, again, len(store))
        store.verify()
        assert sorted(os.listdir(".")) == ["s.json", "s_docs.npy", "s_keys.npy", "s_vals.npy"], (at, os.listdir("."))
    os.chdir("..")
    if status == 0:
        break
    assert status == -signal.SIGKILL, (at, status)
print("killed", at - 1)
"""


def make(prefix: Path, *, sharded: bool) -> None:
    if not sharded:
        save_keys(prefix, KEYS)
        return
    for shard, keys in enumerate((KEYS[:25], KEYS[25:])):
        metadata = {"shard_id": shard, "num_shards": 2, "first_row": 25 * shard, "num_documents": 1}
        whole = np.array([[0, 0, 25 * shard]])
        with DatastoreWriter(f"{prefix}.part{shard}-of-2", *keys.shape, "float32", metadata, documents=whole) as writer:
            writer.append(keys, np.arange(len(keys)))
            writer.finish()
    merge(prefix)


@pytest.mark.parametrize("sharded", [False, True])
def test_killed_at_every_event_the_same_command_deletes_the_same_rows(tmp_path: Path, sharded: bool) -> None:
    (tmp_path / "store").mkdir()
    make(tmp_path / "store" / "s", sharded=sharded)
    np.save(tmp_path / "expected.npy", LEFT)
    words = [sys.executable, "-c", KILLER, "store", WORDS]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 12


def test_the_same_command_again_takes_no_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("s"), sharded=False)
    command.main(WORDS.split())
    command.main(["delete", "s", "--rows", "10-20,3", "--compact"])  # the same rows in another order
    assert "s is without these rows already (48 rows, generation 1)" in capsys.readouterr().out
    np.testing.assert_array_equal(Datastore.open("s").keys, LEFT)
    with pytest.raises(ValueError, match="--generation 0: the rows .* it is of generation 1 .*give --generation 1"):
        command.main(["delete", "s", "--rows", "5", "--compact", "--generation", "0"])
    command.main([*WORDS.split(), "--generation", "1"])
    np.testing.assert_array_equal(Datastore.open("s").keys, np.delete(LEFT, [3, *range(10, 21)], axis=0))
    command.main([*WORDS.split(), "--generation", "1"])
    store = Datastore.open("s")
    assert (len(store), generation_of(store)) == (36, 2)
    command.main(["info", "s"])
    assert "generation: 2" in capsys.readouterr().out


def test_a_request_is_done_only_while_its_generation_is_the_last(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    save_keys(prefix, KEYS)
    request = request_digest(np.array([1, 2]), [])
    assert compacted_by(prefix, request, None) is None
    delete(prefix, np.array([1, 2]))
    compact(prefix, request)
    assert compacted_by(prefix, request, None) is not None
    assert compacted_by(prefix, request, 0) is not None
    assert compacted_by(prefix, request, 1) is None
    assert compacted_by(prefix, request_digest(np.array([1]), []), None) is None
    delete(prefix, np.array([7]))
    assert compacted_by(prefix, request, None) is None

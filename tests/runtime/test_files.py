"""Locks that name their holder, and temporary files that no other process meets."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fairseq.runtime.atomic_files import replacing, write_atomically
from fairseq.runtime.files import LockedError, locked, may_create_in


def dead_process() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    wanted = rf"another process is writing it \(process {os.getpid()} on {socket.gethostname()}, lock .*x.lock"
    with locked(path, "it"), pytest.raises(OSError, match=wanted), locked(path, "it"):
        pass
    assert not path.exists()


def test_a_holder_that_has_not_signed_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, path.write_text, ("123 there\n",))
        timer.start()
        with pytest.raises(LockedError, match="process 123 on there"), locked(path, "it"):
            pass
        timer.join()
        path.write_text("")
        timer = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with locked(path, "it"):
            assert path.read_text().split()[0] == str(os.getpid())
        timer.join()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.write_text(f"{dead_process()} {socket.gethostname()}\n")
    with locked(path, "it"):
        assert path.read_text().split()[0] == str(os.getpid())


def test_folders_are_made_and_leftovers_of_killed_processes_removed(tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "out.json"
    write_atomically(path, "1")
    dead = path.with_name(f"out.json.{socket.gethostname()}-{dead_process()}.tmp")
    alive = path.with_name(f"out.json.{socket.gethostname()}-{os.getppid()}.tmp")
    elsewhere = path.with_name("out.json.another-host-1.tmp")
    for leftover in (dead, alive, elsewhere):
        leftover.write_text("half")
    write_atomically(path, "2")
    assert path.read_text() == "2"
    assert [p.exists() for p in (dead, alive, elsewhere)] == [False, True, True]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            Path(temporary).write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_a_check_for_room_leaves_nothing_behind(tmp_path: Path) -> None:
    may_create_in(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []

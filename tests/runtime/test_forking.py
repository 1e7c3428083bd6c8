"""Objects in forked processes: they answer as objects here do, and end when whoever made them does."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from fairseq.runtime.forking import FORKS, ForkedObject, LocalObject, packed, start_origin

pytestmark = pytest.mark.skipif(not FORKS, reason="needs Linux")


class Process:
    """Facts about the process that it lives in."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def parent(self) -> int:
        return os.getppid()

    def number(self) -> int:
        return os.getpid()

    def fail(self, kind: str) -> None:
        raise {"value": ValueError, "other": KeyError}[kind]("wrong")

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


@pytest.fixture
def name() -> str:
    return f"fairseq-test-{secrets.token_hex(8)}"


def gone(process: int) -> bool:
    """True when a process has ended, within some seconds."""
    for _ in range(200):
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().split()[2] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def make(name: str, *arguments) -> ForkedObject:
    return ForkedObject(name, __name__, packed(Process, *arguments))


def test_forked_objects_share_an_origin_and_have_their_own_process_and_environment(name, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_TEST", "a")
    first = make(name, ["x"])
    monkeypatch.setenv("FAIRSEQ_TEST", "b")
    second = make(name, ["y"])
    assert first.call("parent") == second.call("parent") != os.getpid()
    assert len({os.getpid(), first.call("number"), second.call("number")}) == 3
    assert [each.call("variable", "FAIRSEQ_TEST") for each in (first, second)] == ["a", "b"]
    assert not start_origin(name, __name__)
    here = LocalObject(Fraction, 1, 3)
    there = ForkedObject(name, "fractions", packed(Fraction, 1, 3))
    assert there.call("limit_denominator", 2) == here.call("limit_denominator", 2) == Fraction(1, 2)


def test_errors_travel(name):
    made = make(name, [])
    with pytest.raises(ValueError, match="wrong"):
        made.call("fail", "value")
    with pytest.raises(RuntimeError, match="KeyError: 'wrong'"):
        made.call("fail", "other")
    with pytest.raises(RuntimeError, match="TypeError"):
        make(name)
    with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
        ForkedObject(name, __name__, packed(Fraction, 1, 3).replace(b"fractions", b"fraktions"))


def test_a_forked_process_ends_with_its_maker_and_its_maker_with_it(name):
    other = make(name, [])
    text = (
        "import os, sys; from fairseq.runtime.forking import *; from fractions import Fraction\n"
        f"made = ForkedObject({name!r}, '', packed(Fraction, 1, 3))\n"
        "print(made._connection.fileno(), flush=True); sys.stdin.readline(); made.call('__neg__')"
    )
    origin, found = other.call("parent"), set()
    for end in ("maker", "forked"):
        with subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as maker:
            assert maker.stdout.readline()
            (forked,) = children(origin) - {other.call("number")}
            found.add(forked)
            os.kill(maker.pid if end == "maker" else forked, signal.SIGKILL)
            if end == "forked":
                maker.stdin.write("\n")
            maker.stdin.close()
            assert maker.wait() == (-signal.SIGKILL if end == "maker" else 1)
            assert gone(forked)
    assert len(found) == 2
    assert other.call("parent") == origin


def children(process: int) -> set[int]:
    """Processes that a process has forked, the ended ones not counted."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(process)], capture_output=True, text=True)
    return {int(line.split()[0]) for line in found.stdout.splitlines() if "Z" not in line}


def test_an_origin_ends_with_those_who_use_it():
    text = (
        "import os; from fairseq.runtime.forking import *\n"
        "from fractions import Fraction; name = f'fairseq-test-{os.getpid()}'; start_origin(name, 'fractions')\n"
        "made = ForkedObject(name, 'fractions', packed(Fraction, 1, 3))\n"
        "from fairseq.runtime import forking; print(forking._held[0].pid)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert gone(int(done.stdout))

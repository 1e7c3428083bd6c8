"""The scripts as processes of their own without the seconds in which each imports PyTorch.

As a program it imports what the scripts import and forks for every request (a JSON object a line on standard input,
the answer on standard output); ``Forks`` is the other end. Nothing runs in the forking process itself, so that a
command finds the state of a process that has just started; what a script imports by itself is tested elsewhere, by
those that start it in the usual way.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "preprocess",
    "train",
    "eval_lm",
    "eval_lm_trime",
    "build_dstore",
    "generate",
    "save_datastore",
    "data.bm25_search",
)
MODULES = (
    "faiss",
    "lightning",
    "torch._dynamo",  # by the first step of an optimizer
    "fairseq.tasks.translation",
    "fairseq.memory.kernel_warmup",
    "fairseq.memory.index.exact.kernels",
    "fairseq.memory.index.lists.large_k_kernels",
    "fairseq.memory.retomaton.kernels",
)


class ForkedProcess:
    """A script that runs; what it prints is in ``out`` and ``err`` when it has ended."""

    def __init__(self, forks: Forks, pid: int, folder: str) -> None:
        self.pid, self.returncode, self.out, self.err = pid, None, "", ""
        self._forks, self._folder = forks, Path(folder)

    def poll(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        return self.wait(0.0, kill=False)

    def wait(self, seconds: float = 300.0, *, kill: bool = True) -> int | None:
        """Wait for its end; it is killed when the time is over."""
        if self.returncode is None:
            self.returncode = self._forks.ask(wait=self.pid, seconds=seconds, kill=kill)
        if self.returncode is not None:
            self.out, self.err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return self.returncode


class Forks:
    """Starts scripts as forks of a process that has imported what they need."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory()

    def start(self, script: str, *words: object) -> ForkedProcess:
        """Start a script of the project's folder."""
        folder = tempfile.mkdtemp(dir=self._folder.name)
        for name in ("out", "err"):
            (Path(folder) / name).touch()  # it may be killed before it opens them
        line = [str(ROOT / script), *map(str, words)]
        return ForkedProcess(self, self.ask(start=line, cwd=os.getcwd(), folder=folder, env=dict(os.environ)), folder)

    def load(self, *modules: str) -> None:
        """Import what some scripts need besides, so that each of them need not."""
        self.ask(load=modules)

    def ask(self, **request: Any) -> Any:
        """The answer to one request."""
        assert self._server.stdin is not None and self._server.stdout is not None  # noqa: PT018
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the forking process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._folder.cleanup()


def _become(request: dict[str, Any]) -> None:
    """Run a script in this process, a fork, and end it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    random.seed()  # or all forks would draw the same numbers where nothing is seeded
    np.random.seed()
    os.environ.update(request["env"], OMP_NUM_THREADS="1")
    sys.argv = request["start"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as the interpreter does for a script
    end_after(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))


def end_after(work: Callable[[], object]) -> NoReturn:
    """Do some work in a fork, and end the process as a program that did it would end."""
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code or 0 if isinstance(code, (int, type(None))) else 1)


def _wait(pid: int, seconds: float, kill: bool) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            if not kill:
                return None
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)


def main() -> None:
    for name in (*(f"fairseq_cli.{command}" for command in COMMANDS), *MODULES):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            answer = [importlib.import_module(name).__name__ for name in request["load"]]
        elif "wait" in request:
            answer = _wait(request["wait"], request["seconds"], request["kill"])
        else:
            answer = os.fork()
            if not answer:
                _become(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Compiled kernels on disk: found again, told apart, written by several processes at once, and missed in no case."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from fairseq.memory import kernel_warmup
from fairseq.memory.index.ops import kernel_cache
from fairseq.memory.index.ops.kernel_cache import KernelCache, cache_folder
from fairseq.memory.index.ops.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import logging
import sys
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
import numpy as np
from fairseq.memory.index.exact.kernels import reached_by
for dtype in map(np.dtype, sys.argv[1:]):
    out = np.empty(1, dtype)
    reached_by(np.arange(9, dtype=dtype)[None], np.full(1, 9), 2, out)
    print(out[0])
"""
ONCE = "INFO fairseq.memory.index.ops.kernel_cache compiling kernels, once per machine"
ALWAYS = "WARNING fairseq.memory.index.ops.kernel_cache compiling kernels in every process: "


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def start(*types: str, **more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CODE, *(types or ("float32",))]
    return subprocess.Popen(words, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log_of(process: subprocess.Popen[str]) -> list[str]:
    """Lines of the log of a process whose results are right."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert all(6.9 < float(line) <= 7.0 for line in out.split()), out
    return err.splitlines()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_first_compilation_is_announced_once_and_none_where_the_kernels_are_kept(tmp_path: Path) -> None:
    first = log_of(start("float32", "float32", "float64", XDG_CACHE_HOME=str(tmp_path)))
    assert [line for line in first if line.startswith(ONCE)] == first
    assert len(first) == 1
    kept = content(tmp_path / "fairseq-memory" / "kernels")
    assert {name.partition("-")[0] for name in kept} >= {"index.exact.kernels.reached_by"}
    assert log_of(start("float64", "float32", XDG_CACHE_HOME=str(tmp_path))) == []
    assert content(tmp_path / "fairseq-memory" / "kernels") == kept


def test_two_processes_that_compile_at_once_leave_what_one_leaves(tmp_path: Path) -> None:
    processes = [start(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert all(line.startswith(ONCE) for process in processes for line in log_of(process))
    names = content(tmp_path)
    assert all(re.fullmatch(r"index\.[\w.]+-[0-9a-f]{32}\.nbc", name) for name in names), names
    assert log_of(start(NUMBA_CACHE_DIR=str(tmp_path))) == []


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the kernels of the program are kept."""
    folder = tmp_path_factory.mktemp("filled")
    log_of(start(NUMBA_CACHE_DIR=str(folder)))
    return folder


def test_a_damaged_file_is_compiled_again(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    kept = content(tmp_path)
    for number, path in enumerate(tmp_path.rglob("*.nbc")):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data[:99] + b"?" + data[100:])
    assert [line.startswith(ONCE) for line in log_of(start(NUMBA_CACHE_DIR=str(tmp_path)))] == [True]
    assert content(tmp_path).keys() == kept.keys()
    assert log_of(start(NUMBA_CACHE_DIR=str(tmp_path))) == []


def test_a_folder_that_cannot_be_written_is_read_and_named_once_where_it_lacks_a_kernel(
    filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kernels").chmod(0o555)
    assert log_of(start(NUMBA_CACHE_DIR=str(tmp_path))) == []
    (tmp_path / "empty" / "kernels").mkdir(parents=True)
    (tmp_path / "empty" / "kernels").chmod(0o555)
    (line,) = log_of(start(NUMBA_CACHE_DIR=str(tmp_path / "empty")))
    assert line.startswith(f"{ALWAYS}{str(tmp_path / 'empty' / 'kernels')!r} is read-only; set NUMBA_CACHE_DIR")
    (tmp_path / "file").touch()
    (line,) = log_of(start(XDG_CACHE_HOME=str(tmp_path / "file")))
    assert line.startswith(f"{ALWAYS}cannot make ")


def test_a_user_without_a_home_gets_one_line_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache.platformdirs, "user_cache_path", lambda *_: Path("~/.cache/fairseq-memory"))
    assert cache_folder() is None
    assert kernel_cache.why_not_kept() == "this user has no home"

    def double(x: float) -> float:
        return 2 * x

    kernel: Any = numba.njit(double)
    kernel._cache = KernelCache(kernel_cache.cache_folder)  # of any function whose source is known
    assert kernel(2.5) == 5.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["numba", "source", "types", "cpu"])
def test_no_two_kernels_share_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path))
    kernel = next(iter(KERNELS.values()))[0]
    types, cpu = ("float32",), ("x86_64", "skylake", "+avx2")
    before = kernel_cache._KernelFile(kernel.py_func)._path((types, cpu, None))
    assert kernel_cache._KernelFile(kernel.py_func)._path((types, cpu, None)) == before
    if name == "numba":
        monkeypatch.setattr(kernel_cache, "_COMPILER", ("0.0", *kernel_cache._COMPILER[1:]))
    if name == "source":
        monkeypatch.setattr(kernel_cache, "_source_digest", lambda module: "another")
    types, cpu = ("float64",) if name == "types" else types, ("x86_64", "znver4", "") if name == "cpu" else cpu
    assert kernel_cache._KernelFile(kernel.py_func)._path((types, cpu, None)) != before


def test_the_digest_of_a_module_holds_every_module_of_ours_that_it_imports() -> None:
    """A kernel is compiled together with those that it calls, and with the constants that it reads."""
    holders = [p for p in (ROOT / "fairseq").rglob("*.py") if re.search(r"^@compiled\(", p.read_text(), re.MULTILINE)]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in holders}
    assert names == set(kernel_warmup.MODULES)
    for path in [*holders, ROOT / "fairseq/memory/index/ops/lane_sum_kernels.py"]:
        source = path.read_text()
        imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
        ours = {name for name in imported if name and name.startswith("fairseq")} - {kernel_cache.__name__}
        assert set(re.findall(r"^from (fairseq\.[\w.]+kernels) import", source, re.MULTILINE)) == ours, path
        assert not any(isinstance(n, ast.Import) and "fairseq" in n.names[0].name for n in ast.walk(ast.parse(source)))


def run_every_search(folder: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "tests" / "helpers" / "every_search.py"), *words]
    where = environment() if folder is None else environment(NUMBA_CACHE_DIR=str(folder))
    return subprocess.run(line, env=where, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_after_warming_no_search_compiles_anything(tmp_path: Path) -> None:
    """In the user's own folder, so that only the first of all test runs compiles: it takes a minute."""
    line = [sys.executable, "-m", "fairseq_cli.datastore", "doctor"]
    said = subprocess.run([*line, "--warm"], env=environment(), capture_output=True, text=True, check=True).stdout
    total = kernel_warmup.status().total
    assert said.count("\n") == total + 1
    assert f"[{total}/{total}] " in said
    assert f"kernels: {total} of {total} are compiled, in " in said
    asked = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    assert asked.stdout.startswith(f"kernels: {total} of {total} are compiled, in ")
    assert asked.stderr == ""
    done = run_every_search(None)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"compiled": [], "uncalled": [], "undeclared": []}
    cold = run_every_search(tmp_path, "--stop")
    assert cold.returncode == 1
    assert len(json.loads(cold.stderr.splitlines()[-1])["compiled"]) == 1


def test_the_doctor_says_what_is_not_compiled(tmp_path: Path) -> None:
    def said(*words: str, expect: int = 0, **more: str) -> str:
        line = [sys.executable, "-m", "fairseq_cli.datastore", "doctor", *words]
        done = subprocess.run(line, env=environment(**more), capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        return done.stderr if expect else done.stdout

    total = kernel_warmup.status().total
    folder = str(tmp_path / "kernels")
    start = f"kernels: 0 of {total} are compiled, in {folder!r}; fairseq-datastore doctor --warm compiles the others\n"
    assert said(NUMBA_CACHE_DIR=str(tmp_path)) == start
    (tmp_path / "kernels").chmod(0o555)
    reason = f"{folder!r} is read-only; set NUMBA_CACHE_DIR to a folder for them\n"
    assert said(NUMBA_CACHE_DIR=str(tmp_path)) == f"kernels: every process compiles them: {reason}"
    told = said("--warm", NUMBA_CACHE_DIR=str(tmp_path), expect=2)
    assert told == f"fairseq-datastore: error: compiled kernels cannot be kept: {reason}"


def test_an_inner_kernel_is_called_by_kernels_only() -> None:
    from fairseq.memory.index.ops.kernels import approx_kth_largest

    scores = np.arange(9, dtype=np.float32)
    assert 6.9 < numba.njit(lambda scores, k: approx_kth_largest(scores, k))(scores, 2) <= 7.0

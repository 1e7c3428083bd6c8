"""Compiled kernels on disk: found again, told apart, written by several processes at once, and missed in no case."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from fairseq.memory import kernel_warmup
from fairseq.memory.index.ops import kernel_cache, numba_library
from fairseq.memory.index.ops.kernel_cache import KernelCache, cache_folder
from fairseq.memory.index.ops.kernels import KERNELS
from fairseq_cli.datastore import main

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import logging
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s %(message)s")
import numpy as np
from fairseq.memory.index.exact import kernels
out = np.empty(1, np.float32)
kernels.reached_by(np.arange(9, dtype=np.float32)[None], np.full(1, 9), 2, out)
print(out[0])
"""
ONCE = "INFO fairseq.memory.index.ops.kernel_cache compiling kernels, once per machine"
ALWAYS = "compiling kernels in every process: "


@pytest.fixture(autouse=True)
def _known_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor does not measure the disk here: it writes 256 MB each time."""
    monkeypatch.setattr("fairseq.memory.planning.doctor.disk_rates", lambda path: (1e9, 2e9))


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that calls one kernel, which calls others."""
    words, env = [sys.executable, "-c", CODE], environment(NUMBA_CACHE_DIR=str(folder))
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log_of(process: subprocess.Popen[str]) -> list[str]:
    """Lines of the log of a process whose results are right."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert all(6.9 < float(line) <= 7.0 for line in out.split()), out
    return err.splitlines()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that two processes fill at once."""
    folder = tmp_path_factory.mktemp("filled")
    processes = [start(folder) for _ in range(2)]
    logs = [log_of(process) for process in processes]
    assert [line.startswith(ONCE) for log in logs for line in log] == [True, True]
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be, in which this process keeps kernels; it has announced nothing yet."""
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(KernelCache, "announced", False)
    monkeypatch.setattr(KernelCache, "save_error", None)
    return tmp_path / "base" / "kernels"


def double(x: float) -> float:
    return 2 * x


def triple(x: float) -> float:
    return 3 * x


def fresh(function: Callable[[float], float] = double) -> Any:
    """A kernel as a new process has it: neither compiled nor loaded."""
    kernel: Any = numba.njit(nogil=True, error_model="numpy", fastmath=False, no_cfunc_wrapper=True)(function)
    kernel._cache = KernelCache(function)
    return kernel


def is_loaded(kernel: Any) -> bool:
    """True if a call finds the kernel on disk; its result is right."""
    assert kernel(2.5) == kernel.py_func(2.5)
    return bool(kernel.stats.cache_hits)


def test_two_processes_that_compile_at_once_announce_it_once_and_leave_what_a_third_finds(filled: Path) -> None:
    names = content(filled)
    assert {name.partition("-")[0] for name in names} > {"index.exact.kernels.reached_by"}
    assert all(re.fullmatch(r"index\.[\w.]+-[0-9a-f]{32}\.nbc", name) for name in names), names
    assert log_of(start(filled)) == []
    assert content(filled) == names


def test_only_this_user_can_enter_the_folder_and_write_its_files(filled: Path) -> None:
    assert (filled / "kernels").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in filled.rglob("*.nbc")} == {0o600}


def damage(data: bytes) -> bytes:
    return data[:99] + bytes([data[99] ^ 1]) + data[100:]


def other_content(data: bytes) -> bytes:
    """Whole by its checksum, but nothing of which a kernel can be made."""
    held = pickle.dumps({"no": "kernel"})
    return held + hashlib.sha256(held).digest()


def cut_content(data: bytes) -> bytes:
    return data[:999] + hashlib.sha256(data[:999]).digest()


@pytest.mark.parametrize("change", [lambda data: data[: len(data) // 2], damage, other_content, cut_content])
def test_a_file_of_which_no_kernel_can_be_made_is_compiled_again(folder: Path, change: Any) -> None:
    assert not is_loaded(fresh())
    (path,) = folder.glob("*.nbc")
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    assert not is_loaded(fresh())
    assert path.read_bytes() != change(whole)
    assert is_loaded(fresh())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    held = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return held


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(
    folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_loaded(fresh())
    kept = content(folder)
    folder.chmod(mode)
    KernelCache.announced = False
    assert not is_loaded(fresh())
    assert not is_loaded(fresh(triple))
    (line,) = warnings_in(caplog)
    assert line.startswith(f"compiling kernels in every process: other users can write {str(folder)!r} (mode 0{mode:o}")
    assert "chmod go-w" in line
    assert content(folder) == kept
    folder.chmod(0o755)
    assert is_loaded(fresh())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_read(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_loaded(fresh())
    (path,) = folder.glob("*.nbc")
    if os.geteuid() == 0:
        os.chown(folder if what == "folder" else path, 4243, -1)
    else:
        monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: 4242)
    KernelCache.announced = False
    assert not is_loaded(fresh())
    if what == "folder":
        (line,) = warnings_in(caplog)
        assert f"{str(folder)!r} belongs to another user" in line


def test_a_file_that_others_can_write_is_compiled_again_and_replaced(folder: Path) -> None:
    assert not is_loaded(fresh())
    (path,) = folder.glob("*.nbc")
    path.chmod(0o666)
    assert not is_loaded(fresh())
    assert path.stat().st_mode & 0o777 == 0o600
    assert is_loaded(fresh())


def test_a_folder_that_cannot_be_written_is_read_and_named_once_where_it_lacks_a_kernel(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_loaded(fresh())
    caplog.clear()
    folder.chmod(0o555)
    assert is_loaded(fresh())
    assert warnings_in(caplog) == []
    KernelCache.announced = False
    assert fresh(triple)(2.0) == fresh(triple)(2.0) == 6.0
    (line,) = warnings_in(caplog)
    assert line == f"{ALWAYS}{str(folder)!r} is read-only; set NUMBA_CACHE_DIR to a folder to keep them in"


def test_what_stands_in_the_place_of_the_folder_is_named(folder: Path) -> None:
    name = str(folder)
    assert kernel_cache.why_not_kept() == ""
    assert not folder.parent.exists()
    folder.parent.mkdir()
    folder.touch()
    assert kernel_cache.why_not_kept() == f"{name!r} is a file, not a folder"
    folder.unlink()
    folder.symlink_to("nowhere")
    assert kernel_cache.why_not_kept() == f"{name!r} is a dead link, not a folder"
    folder.unlink()
    folder.parent.chmod(0o555)
    assert kernel_cache.why_not_kept() == f"cannot make {name!r}: {str(folder.parent)!r} is read-only"
    folder.parent.rmdir()
    folder.parent.touch()
    assert kernel_cache.why_not_kept() == f"cannot make {name!r}: {str(folder.parent)!r} is a file, not a folder"


def test_kernels_are_kept_in_the_cache_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fairseq-memory" / "kernels"


def test_a_user_without_a_home_gets_one_line_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache.platformdirs, "user_cache_path", lambda *_: Path("~/.cache/fairseq-memory"))
    assert cache_folder() is None
    assert kernel_cache.why_not_kept() == "this user has no home"
    assert fresh()(2.5) == 5.0
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_escaped_where_the_locale_has_no_such_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    held = "/tmp/cach\u00e9".encode()
    monkeypatch.setattr(kernel_cache.os, "fsencode", lambda path: held)
    monkeypatch.setattr(kernel_cache.sys, "getfilesystemencoding", lambda: "utf-8")
    assert kernel_cache.readable("/tmp") == "'/tmp/cach\u00e9'"
    monkeypatch.setattr(kernel_cache.sys, "getfilesystemencoding", lambda: "ascii")
    assert kernel_cache.readable("/tmp") == r"'/tmp/cach\xe9'"


@pytest.mark.parametrize("name", ["numba", "source", "types", "cpu"])
def test_no_two_kernels_share_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path))
    kernel = next(iter(KERNELS.values()))[0]
    types, cpu = ("float32",), ("x86_64", "skylake", "+avx2")
    before = kernel_cache._KernelFile(kernel.py_func)._path((types, cpu, None))
    assert kernel_cache._KernelFile(kernel.py_func)._path((types, cpu, None)) == before
    if name == "numba":
        monkeypatch.setattr(kernel_cache, "COMPILER", ("0.0", *kernel_cache.COMPILER[1:]))
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
        ours = {name for name in imported if name and name.startswith("fairseq")} - {
            kernel_cache.__name__,
            numba_library.__name__,
        }
        assert set(re.findall(r"^from (fairseq\.[\w.]+kernels) import", source, re.MULTILINE)) == ours, path
        assert not any(isinstance(n, ast.Import) and "fairseq" in n.names[0].name for n in ast.walk(ast.parse(source)))


@pytest.mark.slow
def test_after_warming_no_search_compiles_anything(capsys: pytest.CaptureFixture[str]) -> None:
    """In the user's own folder, so that only the first of all test runs compiles: it takes a minute."""
    total = kernel_warmup.status().total
    main(["doctor", "--warm"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == total + 1
    assert lines[-2].startswith(f"[{total}/{total}] ")
    assert lines[-1].startswith(f"kernels: {total} of {total} are compiled, in ")
    main(["doctor"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"kernels: {total} of {total} are compiled, in {str(cache_folder())!r}"
    line = [sys.executable, str(ROOT / "tests" / "helpers" / "every_search.py")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"compiled": [], "uncalled": [], "undeclared": [], "sees_a_compilation": True}


def test_the_doctor_says_what_is_not_compiled(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        main(["doctor", "--folder", str(tmp_path)])
        return capsys.readouterr().out.splitlines(keepends=True)[-1]

    total = kernel_warmup.status().total
    name = repr(str(folder))
    start = f"kernels: 0 of {total} are compiled, in {name}; fairseq-datastore doctor --warm compiles the others\n"
    assert said() == start
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    reason = f"{name} is read-only; set NUMBA_CACHE_DIR to a folder for them"
    assert said() == f"kernels: every process compiles them: {reason}\n"
    with pytest.raises(OSError, match=re.escape(f"compiled kernels cannot be kept: {reason}")):
        main(["doctor", "--warm"])


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All kernels that the doctor knows."""
    kernels = [("one", fresh(), (numba.float64,)), ("two", fresh(triple), (numba.float64,))]
    monkeypatch.setattr(kernel_warmup, "_kernels", lambda: kernels)
    return kernels


def test_warming_ends_with_an_error_where_a_kernel_cannot_be_kept(
    folder: Path, two_kernels: list[Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _, kernel, types = two_kernels[1]
    path = kernel._cache._cache_file._path(kernel._cache._index_key(types, kernel.targetctx.codegen()))
    path.mkdir(parents=True)
    folder.chmod(0o700)
    said = f"1 of 2 compiled kernels are kept: {str(path)!r}: Is a directory; remove it or set NUMBA_CACHE_DIR"
    with pytest.raises(OSError, match=re.escape(said)):
        main(["doctor", "--warm"])
    assert capsys.readouterr().out.count("\n") == 2
    assert warnings_in(caplog) == []
    path.rmdir()
    two_kernels[1] = ("two", fresh(triple), types)
    main(["doctor", "--warm"])
    assert "kernels: 2 of 2 are compiled" in capsys.readouterr().out


def test_a_full_disk_is_said_once_and_by_the_doctor_as_an_error(
    folder: Path, two_kernels: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fairseq.runtime.atomic_files.os.fsync", full)
    with pytest.raises(OSError, match=r"^0 of 2 compiled .*\.nbc': no space left on the disk; free some or set NUMBA_"):
        main(["doctor", "--warm"])
    assert warnings_in(caplog) == []
    KernelCache.save_error = None
    assert fresh(triple)(2.0) == fresh(triple)(2.0) == 6.0
    (line,) = warnings_in(caplog)
    assert line.startswith("compiled kernels are not kept: ")
    assert "no space left on the disk; free some or set NUMBA_CACHE_DIR to a folder on another disk" in line
    assert list(folder.glob("*")) == []


def test_a_file_of_which_no_kernel_can_be_made_is_compiled_by_the_doctor(
    folder: Path, two_kernels: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--warm"])
    for path in folder.glob("*.nbc"):
        path.write_bytes(other_content(b""))
    two_kernels[:] = [(name, fresh(kernel.py_func), types) for name, kernel, types in two_kernels]
    capsys.readouterr()
    main(["doctor", "--warm"])
    assert "compiled before" not in capsys.readouterr().out
    two_kernels[:] = [(name, fresh(kernel.py_func), types) for name, kernel, types in two_kernels]
    main(["doctor", "--warm"])
    assert capsys.readouterr().out.count("compiled before") == 2


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("NUMBA_DISABLE_JIT", "1", "fairseq-datastore: error: NUMBA_DISABLE_JIT=1 leaves searches without their"),
        ("NUMBA_NUM_THREADS", "0", "fairseq-datastore: error: NUMBA_NUM_THREADS='0' is less than 1; unset it"),
        ("NUMBA_OPT", "foo", "NUMBA_OPT='foo' cannot be read, numba takes its default; unset it or correct"),
    ],
)
def test_a_setting_of_numba_that_is_none_is_named_in_one_line(name: str, value: str, line: str, tmp_path: Path) -> None:
    folder = next((place for place in ("/dev/shm", tmp_path) if os.access(place, os.W_OK)), tmp_path)
    words = [sys.executable, "-m", "fairseq_cli.datastore", "doctor", "--folder", str(folder)]
    env = environment(NUMBA_CACHE_DIR=str(tmp_path / "none")) | {name: value}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if name == "NUMBA_OPT" else 2)
    (told,) = (line for line in done.stderr.splitlines() if "compiling kernels" not in line)
    assert line in told
    assert name == "NUMBA_OPT" or list(tmp_path.iterdir()) == []  # products are measured, and their kernel is kept


def test_an_inner_kernel_is_called_by_kernels_only() -> None:
    from fairseq.memory.index.ops.kernels import approx_kth_largest

    scores = np.arange(9, dtype=np.float32)
    assert 6.9 < numba.njit(lambda scores, k: approx_kth_largest(scores, k))(scores, 2) <= 7.0

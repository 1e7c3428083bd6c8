"""Compiled kernels on disk: a file for each kernel and types of its arguments, in the user's cache folder.

numba's own cache lies beside the source, which may be read-only, takes a kernel for unchanged when one that it calls
from another file has changed, and numbers its files, so that two processes may give one number to two kernels. Here
the name of a file is a digest of all that the machine code depends on: the source with the kernel modules that it
imports, the types, the CPU, and the versions of numba, LLVM and Python. So a file of that name needs no comparison with
the source, whichever process of this user wrote it.

A kernel file is machine code, and reading it is running what it says: the name and the checksum find damage, not
intent. Hence the folder and its files are used only where nobody but this user and root can write them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import logging
import os
import pickle
import platform
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import platformdirs

from fairseq.memory.index.ops.numba_library import caching, config, numba, rtsys
from fairseq.runtime.atomic_files import may_write_in, naming, writing

logger = logging.getLogger(__name__)

FunctionCache: Any = caching.FunctionCache
CacheLocator: Any = caching._CacheLocator
CompileResultCacheImpl: Any = caching.CompileResultCacheImpl
IndexDataCacheFile: Any = caching.IndexDataCacheFile

_CHECKSUM_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: in NUMBA_CACHE_DIR if that is set; None where the user has no home."""
    base = Path(config.CACHE_DIR) if config.CACHE_DIR else platformdirs.user_cache_path("fairseq-memory", False)
    # A user without a home has "~", which would become a folder of that name in the present one.
    return base.absolute() / "kernels" if config.CACHE_DIR or base.is_absolute() else None


def why_not_kept() -> str:
    """Why compiled kernels are not kept for the next process; an empty string where they are. Makes no folder."""
    folder = cache_folder()
    if folder is None:
        return "this user has no home"
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    reason = why_not_used(existing) if existing == folder else _why_no_folder(existing)
    if not reason and not may_write_in(existing):
        reason = f"{readable(existing)} is read-only"
    return reason if existing == folder or not reason else f"cannot make {readable(folder)}: {reason}"


def why_not_used(folder: Path) -> str:
    """Why no kernel is read from an existing folder; an empty string where they are."""
    return _why_no_folder(folder) or _why_distrusted(folder, os.stat(folder))


def _why_no_folder(path: Path) -> str:
    if path.is_dir():
        return ""
    return f"{readable(path)} is a {'file' if path.exists() else 'dead link'}, not a folder"


def _why_distrusted(path: Path, status: os.stat_result) -> str:
    """Who else can write a file or folder, and the way out; an empty string where nobody but this user and root can."""
    if os.name == "nt":  # modes say nothing there
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"{readable(path)} belongs to another user ({status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"other users can write {readable(path)} (mode {mode:04o}); run chmod go-w on it"
    return ""


def readable(path: str | os.PathLike[str]) -> str:
    """A path in quotes: where the locale is ASCII, what it does not have is escaped, instead of half characters."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return repr(text) if sys.getfilesystemencoding().lower() == "utf-8" else ascii(text)


def kernel_name(function: Callable[..., Any]) -> str:
    """A kernel's module and name, without the package."""
    return f"{function.__module__.removeprefix('fairseq.memory.')}.{function.__qualname__}"


class KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of a kernel, with files of :class:`_KernelFile`.

    A kernel whose file is missing, damaged, or cannot be read or written is compiled; nothing of that ends a search.
    """

    announced = False
    """True when the log says that kernels are compiled."""
    reporting = False
    """True while a command reports what is compiled and kept, instead of the log."""
    save_error: OSError | None = None
    """The first that kept a kernel from being saved."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _KernelFile(function)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The kernel for these types; None, after a line in the log, where it must be compiled.

        numba would load all that it can compile first (0.2 s), which machine code does not need to run.
        """
        try:
            rtsys.initialize(target_context)
            loaded = self._load_overload(sig, target_context)
        except Exception as error:  # whatever is in the file: it is compiled again, and the file replaced
            logger.debug("a compiled kernel cannot be loaded: %s", error)
            loaded = None
        if loaded is None:
            _announce()
        return loaded

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel, where that can be done; the first that cannot is in ``save_error`` and, once, in the log."""
        if why_not_kept():
            return  # the log says so already
        try:
            super().save_overload(sig, data)
        except OSError as error:
            if KernelCache.save_error is None:
                KernelCache.save_error = error
                if not KernelCache.reporting:
                    logger.warning("compiled kernels are not kept: %s", what_to_do(error))

    def has(self, types: Any, target_context: Any) -> bool:
        """True if the kernel for these types is on disk, whole."""
        target_context.refresh()
        file: _KernelFile = self._cache_file
        return file.is_whole(self._index_key(types, target_context.codegen()))


class _Locator(CacheLocator):  # type: ignore[misc]
    """What numba asks about a kernel before it has a file: any answer will do, so that nothing is written for it."""

    def __init__(self, path: str) -> None:
        self._py_file = path  # for warnings

    @classmethod
    def from_function(cls, function: Any, path: str) -> _Locator:
        return cls(path)

    def ensure_cache_path(self) -> None:
        """Nothing: the folder is made with the first file."""

    def get_cache_path(self) -> str:
        return str(cache_folder() or "")

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return ""


class _Implementation(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012


KernelCache._impl_class = _Implementation


class _KernelFile(IndexDataCacheFile):  # type: ignore[misc]
    """The files of a kernel, without an index. The content is followed by its checksum."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def save(self, key: Any, data: Any) -> None:
        content, path = self._dump(data), self._path(key)
        with naming(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with writing(path, binary=True) as file:
            os.chmod(file.name, 0o600)
            file.write(content + hashlib.sha256(content).digest())

    def load(self, key: Any) -> Any:
        content = self._read(key)
        # The bytes that were checked: opening the file once more could find another.
        return pickle.loads(content) if content else None

    def is_whole(self, key: Any) -> bool:
        """True if the file is there, as it was written, and nobody else can write it."""
        return bool(self._read(key))

    def _read(self, key: Any) -> bytes:
        """The content without its checksum; nothing where it is missing, damaged or writable by others."""
        path = self._path(key)
        try:
            if cache_folder() is None or why_not_used(path.parent):
                return b""
            with open(path, "rb") as file:
                content = b"" if _why_distrusted(path, os.fstat(file.fileno())) else file.read()
        except OSError:
            return b""
        content, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        return content if hashlib.sha256(content).digest() == checksum else b""

    def flush(self) -> None:
        """Nothing: a file is never out of date."""

    def _path(self, key: Any) -> Path:
        types, cpu, _ = key
        module, name = self._function.__module__, self._function.__qualname__
        parts = (module, name, types, cpu, _source_digest(module), *COMPILER, config.OPT, config.BOUNDSCHECK)
        digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
        return (cache_folder() or Path()) / f"{kernel_name(self._function)}-{digest}.nbc"


COMPILER = (numba.__version__, llvmlite.__version__, platform.python_implementation(), sys.version_info[:2])


@functools.cache
def _source_digest(module: str) -> str:
    """Digest of a module of kernels and of those that it imports names from."""
    source = inspect.getsource(sys.modules[module])
    digest = hashlib.sha256(source.encode())
    for name in re.findall(r"^from (fairseq\.[\w.]+kernels) import", source, re.MULTILINE):
        digest.update(_source_digest(name).encode())
    return digest.hexdigest()


def what_to_do(error: OSError) -> str:
    """The failed write of a kernel in one line: the file, what is wrong and the way out."""
    where = error.filename2 or error.filename
    name = f"{readable(where)}: " if where else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{name}no space left on the disk; free some or set NUMBA_CACHE_DIR to a folder on another disk"
    return f"{name}{error.strerror or error}; remove it or set NUMBA_CACHE_DIR to another folder"


def _announce() -> None:
    """Log one line at the first kernel that is compiled, rather than found on disk: that takes seconds to a minute."""
    if KernelCache.announced or KernelCache.reporting:
        return
    KernelCache.announced = True
    reason = why_not_kept()
    if reason:
        logger.warning(
            "compiling kernels in every process: %s; set NUMBA_CACHE_DIR to a folder to keep them in", reason
        )
    else:
        logger.info("compiling kernels, once per machine and version; fairseq-datastore doctor --warm compiles all")

"""Compiled kernels on disk: a file for each kernel and types of its arguments, in the user's cache folder.

numba's own cache lies beside the source, which may be read-only, takes a kernel for unchanged when one that it calls
from another file has changed, and numbers its files, so that two processes may give one number to two kernels. Here
the name of a file is a digest of all that the machine code depends on: the source with the kernel modules that it
imports, the types, the CPU, and the versions of numba, LLVM and Python. A file of that name is right, whoever wrote
it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import llvmlite
import numba
import platformdirs
from numba.core import caching
from numba.core import config as numba_config

from fairseq.runtime.atomic_files import may_write_in, writing

logger = logging.getLogger(__name__)

# numba's types do not declare what is used here.
config = cast(Any, numba_config)
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
    """Why compiled kernels are not kept for the next process; an empty string where they are."""
    folder = cache_folder()
    if folder is None:
        return "this user has no home"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot make {str(folder)!r}: {error.strerror}"
    return "" if may_write_in(folder) else f"{str(folder)!r} is read-only"


def kernel_name(function: Callable[..., Any]) -> str:
    """A kernel's module and name, without the package."""
    return f"{function.__module__.removeprefix('fairseq.memory.')}.{function.__qualname__}"


class KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of a kernel, with files of :class:`_KernelFile`. Nothing about it can fail a kernel."""

    announced = False

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _KernelFile(function)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The kernel for these types; None, after a line in the log, where it must be compiled."""
        loaded = super().load_overload(sig, target_context)
        if loaded is None:
            _announce()
        return loaded

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a kernel, where that can be done."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logger.debug("a compiled kernel is not kept: %s", error)

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
    """The files of a kernel, without an index. Behind the content is its checksum, which unpickling passes over."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._cache_path = str(cache_folder() or "")
        self._function = function

    def save(self, key: Any, data: Any) -> None:
        content = self._dump(data)
        if self._cache_path:
            with writing(self._path(key), binary=True) as file:
                file.write(content + hashlib.sha256(content).digest())

    def load(self, key: Any) -> Any:
        return self._load_data(self._path(key).name) if self.is_whole(key) else None

    def is_whole(self, key: Any) -> bool:
        """True if the file is there and as it was written."""
        try:
            content = self._path(key).read_bytes() if self._cache_path else b""
        except OSError:
            return False
        whole = hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest()
        return len(content) > _CHECKSUM_BYTES and content[-_CHECKSUM_BYTES:] == whole

    def flush(self) -> None:
        """Nothing: a file is never out of date."""

    def _path(self, key: Any) -> Path:
        types, cpu, _ = key
        module, name = self._function.__module__, self._function.__qualname__
        parts = (module, name, types, cpu, _source_digest(module), *_COMPILER, config.OPT, config.BOUNDSCHECK)
        digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
        return Path(self._cache_path) / f"{kernel_name(self._function)}-{digest}.nbc"


_COMPILER = (numba.__version__, llvmlite.__version__, platform.python_implementation(), sys.version_info[:2])


@functools.cache
def _source_digest(module: str) -> str:
    """Digest of a module of kernels and of those that it imports names from."""
    source = inspect.getsource(sys.modules[module])
    digest = hashlib.sha256(source.encode())
    for name in re.findall(r"^from (fairseq\.[\w.]+kernels) import", source, re.MULTILINE):
        digest.update(_source_digest(name).encode())
    return digest.hexdigest()


def _announce() -> None:
    """Log one line at the first kernel that is compiled, rather than found on disk: that takes seconds to a minute."""
    if KernelCache.announced:
        return
    KernelCache.announced = True
    reason = why_not_kept()
    if reason:
        logger.warning(
            "compiling kernels in every process: %s; set NUMBA_CACHE_DIR to a folder to keep them in", reason
        )
    else:
        logger.info("compiling kernels, once per machine and version; fairseq-datastore doctor --warm compiles all")

"""Writes a datastore so that it can be killed at any moment and goes on with the same command.

Rows go to ``*.tmp`` files; a progress file says how many of them are safely on disk. The store appears under its own
names only when it is complete, its metadata last.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from fairseq.disk import naming
from fairseq.memory.files import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    KEY_DTYPES,
    Array,
    BlockChecksums,
    StoreFiles,
    locked,
    may_create_in,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)


class DatastoreWriter:
    """Appends rows; ``checkpoint`` makes them survive a kill, ``finish`` makes them a store.

    Use it as a context manager or call ``finish``: both let go of the lock.
    """

    def __init__(
        self,
        prefix: str | Path,
        num_rows: int,
        dim: int,
        dtype: str = "float32",
        metadata: Mapping[str, Any] | None = None,
        resume: bool = True,
    ) -> None:
        """Start, or go on where an interrupted writer with the same arguments stood (``rows_done``, ``cursor``).

        Args:
            num_rows: rows the store will hold.
            metadata: plain values that say where the rows come from, kept in the JSON file. The names a reader checks
                are key_tap, dictionary_digest and dictionary_size. Equal metadata must mean equal rows.
            resume: False throws away what an interrupted writer left.
        Raises: ValueError for impossible arguments; OSError when the disk is too small or another writer is at work.
        """
        if num_rows < 1 or dim < 1:
            raise ValueError(f"a datastore needs at least one row and one column, got {num_rows} x {dim}")
        if dtype not in KEY_DTYPES:
            raise ValueError(f"keys of type {dtype!r}; known: {', '.join(KEY_DTYPES)}")
        self.prefix, self.num_rows, self.dim, self.dtype = str(prefix), num_rows, dim, np.dtype(dtype)
        self._names = StoreFiles.of(prefix, dtype)
        self._signature: dict[str, Any] = {"rows": num_rows, "dim": dim, "key_dtype": dtype, "value_dtype": "int64"}
        self._signature["metadata"] = dict(metadata or {})
        may_create_in(self._names.metadata.parent)
        self._open = ExitStack()
        with ExitStack() as until_ready:
            until_ready.enter_context(self._open)
            self._open.enter_context(locked(self._names.lock, f"datastore {self.prefix!r}"))
            state = self._left_over() if resume else None
            if state is None:
                self._remove_unfinished()
            self.rows_done = int(state["rows_done"]) if state else 0
            self.cursor: dict[str, Any] | None = state["cursor"] if state else None
            self._sums = {part: BlockChecksums(state and state["checksums"][part]) for part in ("keys", "values")}
            self._finished = bool(state and state["finishing"])
            if not self._finished:
                self._check_free_space()
                self._keys = self._open_at(self._names.keys, self.rows_done * dim * self.dtype.itemsize)
                self._values = self._open_at(self._names.values, self.rows_done * 8)
            until_ready.pop_all()

    def __enter__(self) -> DatastoreWriter:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        try:
            self.close()
        except OSError:  # closing writes what is buffered, and fails as the write before did, without the file's name
            if failure is None:
                raise

    def append(self, keys_ND: Array | Tensor, values_N: Array | Tensor) -> None:
        """Add rows at the end.

        Raises: ValueError when shapes do not fit, more rows come than announced or a key is not finite.
        """
        if self._finished:
            return  # an interrupted writer had written all rows; only its renames were left, and they are done
        keys, values = _as_array(keys_ND), _as_array(values_N)
        if keys.shape != (len(values), self.dim) or values.ndim != 1:
            raise ValueError(f"keys {keys.shape} and values {values.shape} do not make rows of width {self.dim}")
        if self.rows_done + len(values) > self.num_rows:
            raise ValueError(
                f"datastore {self.prefix!r} was announced with {self.num_rows} rows; {self.rows_done} are there and "
                f"{len(values)} more came"
            )
        with np.errstate(over="ignore"):
            keys = np.ascontiguousarray(keys, dtype=self.dtype)
        if not np.isfinite(keys).all():
            hint = (
                "too large for float16? save without --dstore-fp16" if self.dtype == np.float16 else "check the model"
            )
            bad = int((~np.isfinite(keys)).any(axis=1).sum())
            raise ValueError(f"{bad} of the keys of rows {self.rows_done} on hold NaN or infinity: {hint}")
        self._write("keys", self._keys, keys)
        self._write("values", self._values, np.ascontiguousarray(values, dtype=np.int64))
        self.rows_done += len(values)

    def checkpoint(self, cursor: Mapping[str, Any] | None = None) -> None:
        """Make all rows so far survive a kill.

        Args:
            cursor: plain values by which the caller finds its place again; given back as ``cursor``.
        """
        if self._finished:
            return
        self.cursor = dict(cursor) if cursor is not None else None
        self._record(finishing=False)

    def finish(self) -> None:
        """Complete the store under its own names, replacing one that was there.

        Raises: ValueError when rows are missing; what is there is kept.
        """
        if self._finished:
            self.close()
            return
        if self.rows_done != self.num_rows:
            raise ValueError(
                f"datastore {self.prefix!r} has {self.rows_done} of the {self.num_rows} announced rows; they are kept: "
                "the same command goes on from its last checkpoint"
            )
        self._record(finishing=True)
        self._keys.close()
        self._values.close()
        self._install(read_json(self._names.progress))
        self._finished = True
        self.close()

    def close(self) -> None:
        """Let go of the files and the lock; unfinished rows stay for the next writer, up to the last checkpoint."""
        self._open.close()

    def _write(self, part: str, file: IO[bytes], rows: Array) -> None:
        data = rows.reshape(-1).view(np.uint8).data
        # Plain writes, not a memory map: dirty pages of a map count as this process's memory until the kernel writes
        # them, so that it would seem to grow with the store.
        with naming(file.name):
            file.write(data)
        self._sums[part].update(data)

    def _record(self, *, finishing: bool) -> None:
        """Put the rows safely on disk, then note how many they are."""
        for file in (self._keys, self._values):
            with naming(file.name):
                file.flush()
                os.fsync(file.fileno())
        state: dict[str, Any] = {"signature": self._signature, "rows_done": self.rows_done, "cursor": self.cursor}
        state["checksums"] = {part: sums.state() for part, sums in self._sums.items()}
        write_json(self._names.progress, state | {"finishing": finishing})

    def _left_over(self) -> dict[str, Any] | None:
        """The progress of an interrupted writer with the same arguments, if its rows are there."""
        if not self._names.progress.exists():
            return None
        state = read_json(self._names.progress)
        if state["finishing"]:
            # All its rows were written: complete it first, whatever command it came from.
            self._install(state)
            return state if state["signature"] == self._signature else None
        if state["signature"] != self._signature:
            logger.warning(
                "%s: another command left %d rows unfinished; they are thrown away", self.prefix, state["rows_done"]
            )
            return None
        sizes = {self._names.keys: self.dim * self.dtype.itemsize, self._names.values: 8}
        for path, row_bytes in sizes.items():
            if not _aside(path).exists() or _aside(path).stat().st_size < state["rows_done"] * row_bytes:
                logger.warning("%s is shorter than its progress file says; starting anew", _aside(path))
                return None
        return state

    def _remove_unfinished(self) -> None:
        for dtype in KEY_DTYPES:
            names = StoreFiles.of(self.prefix, dtype)
            for path in (_aside(names.keys), _aside(names.values), names.progress):
                path.unlink(missing_ok=True)

    def _install(self, state: Mapping[str, Any]) -> None:
        """Rename the finished files; may be repeated after a kill in the middle of it."""
        about: dict[str, Any] = dict(state["signature"])
        names = StoreFiles.of(self.prefix, about["key_dtype"])
        # The metadata of a store that was there go first: half of it is about to be replaced.
        if any(_aside(path).exists() for path in (names.keys, names.values)):
            names.metadata.unlink(missing_ok=True)
        for path in (names.keys, names.values):
            if _aside(path).exists():
                os.replace(_aside(path), path)
        more = about.pop("metadata")
        about = {"format_version": FORMAT_VERSION, "complete": True} | about
        about |= {"keys_file": names.keys.name, "values_file": names.values.name, "block_bytes": BLOCK_BYTES}
        about["checksums"] = {part: BlockChecksums(sums).digests() for part, sums in state["checksums"].items()}
        write_json(names.metadata, more | about)
        names.progress.unlink()
        for other in {StoreFiles.of(self.prefix, dtype).keys for dtype in KEY_DTYPES} - {names.keys}:
            if other.exists():
                logger.warning("%s is not part of the store any more; remove it if you do not need it", other)

    def _check_free_space(self) -> None:
        """Raise OSError with both numbers when the rest of the store does not fit on the disk."""
        rest = (self.num_rows - self.rows_done) * (self.dim * self.dtype.itemsize + 8)
        folder = self._names.keys.parent
        free = shutil.disk_usage(folder).free
        if rest > free:
            raise OSError(
                f"datastore {self.prefix!r} needs {rest} more bytes, {str(folder.resolve())!r} has {free} free; free "
                "some, choose another disk, or halve it with --dstore-fp16"
            )

    def _open_at(self, path: Path, size: int) -> IO[bytes]:
        """The unfinished file, cut to the rows that are safe."""
        mode = "r+b" if size else "wb"
        file: IO[bytes] = self._open.enter_context(open(_aside(path), mode, buffering=1 << 20))  # noqa: SIM115
        file.truncate(size)
        file.seek(size)
        return file


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _as_array(rows: Array | Tensor) -> Array:
    if isinstance(rows, Tensor):
        rows = rows.detach()
        # numpy knows no bfloat16; float32 holds it exactly.
        return np.asarray((rows.float() if rows.dtype.is_floating_point else rows).cpu().numpy())
    return rows

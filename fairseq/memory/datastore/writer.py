"""Crash-safe datastore writer; the same command resumes an interrupted run.

Rows go to ``*.tmp`` files; a progress file records how many of them are synced to disk. The store gets its own names
only when it is complete, its metadata last.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from fairseq.memory.datastore.chunked_array import nonfinite, to_storage_dtype, view_as
from fairseq.memory.datastore.layout import FORMAT_VERSION, KEY_DTYPES, PROGRESS, StoreFiles, require_free
from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import naming
from fairseq.runtime.files import (
    BLOCK_BYTES,
    BlockChecksums,
    file_checksums,
    locked,
    may_create_in,
    require_free_space,
    write_json,
)
from fairseq.runtime.records import read_record, seal

logger = logging.getLogger(__name__)

ARRAYS = ("keys", "values")
SECONDS_BETWEEN_CHECKPOINTS = 5.0


class NonFiniteError(ValueError):
    """A key holds NaN or infinity in the type of the keys on disk."""


class DatastoreWriter:
    """Crash-safe writer of a datastore: one key and one value (the token that came next) per row.

    ``append`` adds rows, ``checkpoint`` makes them survive a kill, ``finish`` turns them into a store. A writer with
    the same arguments resumes from the last checkpoint. Use it as a context manager: that releases the lock.

    ```python
    with DatastoreWriter("store", num_rows=1000, dim=16) as writer:
        writer.append(key_ND, token_N)
        writer.finish()
    ```
    """

    def __init__(
        self,
        prefix: str | Path,
        num_rows: int | None,
        dim: int,
        dtype: str = "float32",
        metadata: Mapping[str, Any] | None = None,
        resume: bool = True,
        documents: Array | None = None,
    ) -> None:
        """Start, or resume an interrupted writer with the same arguments (see ``rows_done`` and ``cursor``).

        Args:
            prefix: start of the file names: ``PREFIX_keys.npy``, ``PREFIX_vals.npy``, ``PREFIX.json``.
            num_rows: rows the store will hold; None for as many as are appended.
            dim: width of the keys.
            dtype: type of the keys on disk: ``float32``, ``float16`` or ``bfloat16``.
            metadata: plain values that say where the rows come from, kept in the JSON file. Readers check key_tap,
                dictionary_digest and dictionary_size. Equal metadata must mean equal rows.
            resume: False discards what an interrupted writer left.
            documents: int64 (runs, 3): first row, document and offset of each run of rows (docs/formats.md).
        Raises: ValueError for impossible arguments, and where files of other programs have its names; OSError when the
            disk is too small or another writer is active.
        """
        if (num_rows is not None and num_rows < 1) or dim < 1:
            raise ValueError(f"a datastore needs at least one row and one column, got {num_rows} x {dim}")
        if dtype not in KEY_DTYPES:
            raise ValueError(f"unknown key type {dtype!r}; choose one of {', '.join(KEY_DTYPES)}")
        self.prefix, self.num_rows, self.dim, self.dtype = str(prefix), num_rows, dim, dtype
        self._key_bytes = dim * KEY_DTYPES[dtype].itemsize
        self._documents = documents
        self._recorded = time.perf_counter()
        self._names = StoreFiles.of(prefix, dtype)
        self._signature: dict[str, Any] = {"rows": num_rows, "dim": dim, "key_dtype": dtype, "value_dtype": "int64"}
        self._signature["metadata"] = dict(metadata or {})
        may_create_in(self._names.metadata.parent)
        self._open = ExitStack()
        with ExitStack() as until_ready:
            until_ready.enter_context(self._open)
            self._open.enter_context(locked(self._names.lock, f"datastore {self.prefix!r}"))
            require_free(prefix, dtype)
            state = self._interrupted_state() if resume else None
            if state is None:
                self._remove_unfinished()
            self.rows_done = int(state["rows_done"]) if state else 0
            self.cursor: dict[str, Any] | None = state["cursor"] if state else None
            self._sums = {array: BlockChecksums(state and state["checksums"][array]) for array in ARRAYS}
            self._finished = bool(state and state["finishing"])
            if not self._finished:
                self._check_free_space()
                self._keys = self._open_at(self._names.keys, self.rows_done * self._key_bytes)
                self._values = self._open_at(self._names.values, self.rows_done * 8)
            until_ready.pop_all()

    def __enter__(self) -> DatastoreWriter:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        try:
            self.close()
        except OSError:  # closing flushes the buffer, and fails as the write before did, without the file's name
            if failure is None:
                raise

    def append(self, keys_ND: Array | Tensor, values_N: Array | Tensor) -> None:
        """Add rows at the end: keys (N, dim) and values (N,).

        Raises: ValueError when shapes do not fit, more rows are appended than announced, or a key is not finite.
        """
        if self._finished:
            return  # an interrupted writer had written all rows; only its renames remained, and they are done
        count = len(values_N)
        if tuple(keys_ND.shape) != (count, self.dim) or values_N.ndim != 1:
            shapes = f"keys {tuple(keys_ND.shape)} and values {tuple(values_N.shape)}"
            raise ValueError(
                f"{shapes} do not make rows of width {self.dim}; pass keys (N, {self.dim}) and values (N,)"
            )
        if self.num_rows is not None and self.rows_done + count > self.num_rows:
            raise ValueError(
                f"datastore {self.prefix!r} was announced with {self.num_rows} rows; {self.rows_done} are written "
                f"and {count} more were appended; announce all rows"
            )
        keys = to_storage_dtype(keys_ND, self.dtype)
        num_nonfinite = len(nonfinite(view_as(keys, self.dtype)))
        if num_nonfinite:
            half = self.dtype == "float16"
            hint = "too large for float16? use --dstore-bf16 or float32" if half else "check the model"
            raise NonFiniteError(
                f"{num_nonfinite} of the keys from row {self.rows_done} on hold NaN or infinity; {hint}"
            )
        self._write("keys", self._keys, keys)
        values = values_N.cpu().numpy() if isinstance(values_N, Tensor) else values_N
        self._write("values", self._values, np.ascontiguousarray(values, dtype=np.int64))
        self.rows_done += count

    def checkpoint(self, cursor: Mapping[str, Any] | None = None) -> None:
        """Sync all rows so far to disk, so that they survive a kill.

        Args:
            cursor: plain values from which the caller resumes; the next writer has them as ``cursor``.
        """
        if self._finished:
            return
        self.cursor = dict(cursor) if cursor is not None else None
        self._record(finishing=False)

    def checkpoint_when_due(self, cursor: Mapping[str, Any] | None = None, seconds: float | None = None) -> None:
        """A :meth:`checkpoint` if the last one, or the start, is some seconds ago; by default five."""
        wait = SECONDS_BETWEEN_CHECKPOINTS if seconds is None else seconds
        if time.perf_counter() - self._recorded > wait:
            self.checkpoint(cursor)
            self._recorded = time.perf_counter()

    def written_values(self, start: int, stop: int) -> Array:
        """Values of written rows, int64; a caller without a cursor finds its position in the text from them."""
        names = StoreFiles.of(self.prefix, self.dtype)
        if not self._finished:
            self._values.flush()
        path = names.values if self._finished else _temporary(names.values)
        return np.array(np.memmap(path, np.int64, "r", shape=(self.rows_done,))[start:stop])

    def finish(self, documents: Array | None = None) -> None:
        """Complete the store under its own names, replacing an existing one.

        Args:
            documents: as in the constructor; for callers that know them only now.
        Raises: ValueError when rows are missing; the written ones are kept.
        """
        if self._finished:
            self.close()
            return
        self._documents = self._documents if documents is None else documents
        if not self.rows_done:
            raise ValueError(f"datastore {self.prefix!r} got no rows; append at least one row with a scored label")
        if self.num_rows is not None and self.rows_done != self.num_rows:
            raise ValueError(
                f"datastore {self.prefix!r} has {self.rows_done} of the {self.num_rows} announced rows; they are kept: "
                "run the same command to resume from its last checkpoint"
            )
        self._record(finishing=True)
        self._keys.close()
        self._values.close()
        install(self.prefix, read_record(self._names.progress, PROGRESS))
        self._finished = True
        self.close()

    def close(self) -> None:
        """Close the files and release the lock; the next writer resumes from the last checkpoint."""
        self._open.close()

    def discard(self) -> None:
        """Remove what is not finished, then close."""
        self._remove_unfinished()
        self.close()

    def _write(self, array: str, file: IO[bytes], rows: Array) -> None:
        data = rows.reshape(-1).view(np.uint8).data
        # Plain writes, not a memory map: dirty pages of a map count as memory of this process until the kernel writes
        # them, so it would appear to grow with the store.
        with naming(file.name):
            file.write(data)
        self._sums[array].update(data)

    def _record(self, *, finishing: bool) -> None:
        """Sync the rows to disk, then record their number."""
        for file in (self._keys, self._values):
            with naming(file.name):
                file.flush()
                os.fsync(file.fileno())
        signature = self._signature | ({"rows": self.rows_done} if finishing else {})
        state: dict[str, Any] = {"signature": signature, "rows_done": self.rows_done, "cursor": self.cursor}
        state |= {"checksums": {array: sums.state() for array, sums in self._sums.items()}, "block_bytes": BLOCK_BYTES}
        if finishing and self._documents is not None:
            state["documents"] = self._write_documents(self._documents)
        write_json(self._names.progress, state | {"finishing": finishing})

    def _write_documents(self, documents: Array) -> list[str]:
        """Write the table of documents beside the rows; returns its checksums."""
        path = _temporary(self._names.documents)
        with naming(path), open(path, "wb") as file:
            np.save(file, documents)
            file.flush()
            os.fsync(file.fileno())
        return list(file_checksums(path, BLOCK_BYTES))

    def _interrupted_state(self) -> dict[str, Any] | None:
        """The progress of an interrupted writer with the same arguments, if its rows exist."""
        if not self._names.progress.exists():
            return None
        state = read_record(self._names.progress, PROGRESS)
        if state["finishing"]:
            # All its rows were written: complete it first, whichever command wrote them.
            install(self.prefix, state)
            final = {"rows": state["rows_done"]} if self.num_rows is None else {}
            return state if state["signature"] == self._signature | final else None
        if state["signature"] != self._signature:
            logger.warning(
                "%s: another command left %d rows unfinished; they are discarded", self.prefix, state["rows_done"]
            )
            return None
        if state["block_bytes"] != BLOCK_BYTES:
            logger.warning("%s was left by another release; starting again", self._names.progress)
            return None
        sizes = {self._names.keys: self._key_bytes, self._names.values: 8}
        for path, row_bytes in sizes.items():
            if not _temporary(path).exists() or _temporary(path).stat().st_size < state["rows_done"] * row_bytes:
                logger.warning("%s is shorter than its progress file says; starting again", _temporary(path))
                return None
        return state

    def _remove_unfinished(self) -> None:
        for dtype in KEY_DTYPES:
            names = StoreFiles.of(self.prefix, dtype)
            for path in (_temporary(names.keys), _temporary(names.values), _temporary(names.documents), names.progress):
                path.unlink(missing_ok=True)

    def _check_free_space(self) -> None:
        """Raise OSError with both numbers when the remaining rows do not fit on the disk."""
        missing_bytes = ((self.num_rows or 0) - self.rows_done) * (self._key_bytes + 8)
        folder = self._names.keys.parent
        advice = "halve the keys with --dstore-fp16 or --dstore-bf16"
        require_free_space(folder, missing_bytes, f"datastore {self.prefix!r}", advice)

    def _open_at(self, path: Path, size: int) -> IO[bytes]:
        """The unfinished file, truncated to the checkpointed rows."""
        mode = "r+b" if size else "wb"
        file: IO[bytes] = self._open.enter_context(open(_temporary(path), mode, buffering=1 << 20))  # noqa: SIM115
        file.truncate(size)
        file.seek(size)
        return file


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def finish_interrupted(prefix: str | Path) -> None:
    """Rename the files of a writer that had written all rows. Raises: OSError when a writer is active."""
    names = StoreFiles.of(prefix)
    if names.progress.exists():
        with locked(names.lock, f"datastore {str(prefix)!r}"):
            state = read_record(names.progress, PROGRESS) if names.progress.exists() else {}
            if state.get("finishing"):
                install(prefix, state)


def install(prefix: str | Path, state: Mapping[str, Any]) -> None:
    """Rename the files of a writer that has finished; safe to repeat after a kill at any point."""
    record: dict[str, Any] = dict(state["signature"])
    names = StoreFiles.of(prefix, record["key_dtype"])
    arrays = [names.keys, names.values, *([names.documents] if state.get("documents") else [])]
    unrenamed = [path for path in arrays if _temporary(path).exists()]
    if not unrenamed and names.metadata.exists():
        names.progress.unlink()  # killed before the last step
        return
    # The metadata of the old store are removed first: half of that store is about to be replaced.
    names.metadata.unlink(missing_ok=True)
    for path in unrenamed:
        os.replace(_temporary(path), path)
    for path in {names.documents, names.deleted} - set(arrays):  # those of the old store
        path.unlink(missing_ok=True)
    user_metadata = record.pop("metadata")
    record = {"format_version": FORMAT_VERSION, "complete": True} | record
    record |= {"keys_file": names.keys.name, "values_file": names.values.name, "block_bytes": state["block_bytes"]}
    record["checksums"] = {array: BlockChecksums(sums).digests() for array, sums in state["checksums"].items()}
    if state.get("documents"):
        record["documents_file"] = names.documents.name
        record["checksums"]["documents"] = state["documents"]
    write_json(names.metadata, seal(user_metadata | record))
    names.progress.unlink()
    for other in {StoreFiles.of(prefix, dtype).keys for dtype in KEY_DTYPES} - {names.keys}:
        if other.exists():
            logger.warning("%s no longer belongs to the store; remove it if you do not need it", other)

"""Rows of a memory-mapped file, read by explicit requests instead of page faults.

Through a map a thread waits for every page that it touches first, a fault at a single row reads what the system reads
ahead for files in order, and a pass over a large file fills the page cache. Measured on a disk of 1.2 GB/s that reads
4 MB ahead, with rows of 2 KB: single rows come at 250 a second through the map and at 55,000 and more by requests that
are announced in bulk; a pass in order costs the CPU 0.75 s a GB through the map, and 0.05 s by direct reads, which go
around the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import naming

_ALIGNMENT = 4096  # of direct reads: in the file, in memory and in length
_GAP_BYTES = 16 << 10  # between rows that one request reads: the disk takes as long for another request
_RUN_BYTES = 4 << 20
_ANNOUNCED = 256  # requests that the disk is told of at a time


@dataclass(frozen=True)
class FileRows:
    """Where the rows of a mapped array are in their file."""

    path: str
    device: int
    inode: int
    """The file that is mapped: another one may have its name by now."""
    offset: int
    """Bytes before the first row."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, array: Array) -> FileRows | None:
        """The place of an array's rows; None for one that is no plain map of a file, or where the system cannot read
        by position."""
        if not isinstance(array, np.memmap) or not hasattr(os, "preadv") or array.filename is None:
            return None
        if array.mode == "c" or not array.flags.c_contiguous or not array.size:
            return None
        # The map begins at a multiple of what the system maps at a time; a slice has its parent's offset.
        mapped = np.frombuffer(array._mmap, np.uint8)  # type: ignore[attr-defined]
        first = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        offset = first + array.ctypes.data - mapped.ctypes.data
        if offset % array.dtype.itemsize:
            return None
        try:
            status = os.stat(array.filename)
        except OSError:  # removed since
            return None
        return cls(str(array.filename), status.st_dev, status.st_ino, offset, array.shape, array.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @contextmanager
    def opened(self, *, direct: bool) -> Iterator[RowReader | None]:
        """A reader of the rows; None if the file has lost its name, perhaps to another one: only the map has it then.

        Args:
            direct: go around the page cache, where the file system can: for rows that are read once, in order.
        """
        try:
            descriptor, direct = _opened(self.path, direct)
        except FileNotFoundError:
            yield None
            return
        try:
            status = os.fstat(descriptor)
            is_same = (status.st_dev, status.st_ino) == (self.device, self.inode)
            yield RowReader(self, descriptor, direct=direct) if is_same else None
        finally:
            os.close(descriptor)


class RowReader:
    """Reads rows of an open file. Threads may share it."""

    def __init__(self, rows: FileRows, descriptor: int, *, direct: bool) -> None:
        """Args.

        direct: the descriptor goes around the page cache.
        """
        self._rows, self._file, self._direct = rows, descriptor, direct

    def block(self, start: int, stop: int) -> Array:
        """Rows from ``start`` to ``stop`` (not included), which leave nothing in the page cache.

        Raises: OSError with the file's name when it cannot be read, or has become shorter.
        """
        size = self._rows.row_bytes
        first, past = (self._rows.offset + row * size for row in (start, stop))
        begin = first // _ALIGNMENT * _ALIGNMENT
        length = -(-(past - begin) // _ALIGNMENT) * _ALIGNMENT
        buffer = _aligned(length)
        try:
            self._fill(buffer, begin, past - begin)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            # The file system opens the file for direct reads and then wants another alignment.
            with naming(self._rows.path):
                descriptor = os.open(self._rows.path, os.O_RDONLY)
            try:
                RowReader(self._rows, descriptor, direct=False)._fill(buffer, begin, past - begin)
            finally:
                os.close(descriptor)
        rows: Array = buffer[first - begin : past - begin].view(self._rows.dtype)
        return rows.reshape(stop - start, *self._rows.shape[1:])

    def _fill(self, buffer: Array, begin: int, wanted: int) -> None:
        """Read bytes from ``begin`` on: at least ``wanted``, and up to the length of the buffer where there are so
        many."""
        view, done = buffer.data, 0
        while done < wanted:
            # A direct read begins at a multiple, also after one that a signal cut short.
            at = done // _ALIGNMENT * _ALIGNMENT if self._direct else done
            with naming(self._rows.path):
                reached = at + os.preadv(self._file, [view[at:]], begin + at)
            if reached <= done:
                raise self._short(begin + done)
            done = reached
        if not self._direct:
            _drop(self._file, begin, len(buffer))

    def take(self, ids_N: Array) -> Array:
        """Some rows, numbers ascending; near ones by one request. They stay in the page cache: some will be read again.

        Raises: OSError as ``block``.
        """
        out = np.empty((len(ids_N), *self._rows.shape[1:]), self._rows.dtype)
        if not len(ids_N):
            return out
        size = self._rows.row_bytes
        place_N = ids_N * size + self._rows.offset
        is_first_N = np.ones(len(ids_N), np.bool_)
        is_first_N[1:] = np.diff(place_N) > size + _GAP_BYTES
        # Long runs in pieces, so that little memory is read into.
        run_N = np.cumsum(is_first_N) - 1
        piece_N = (place_N - place_N[is_first_N][run_N]) // max(size, _RUN_BYTES)
        is_first_N[1:] |= np.diff(piece_N) > 0
        edges = np.append(np.flatnonzero(is_first_N), len(ids_N))
        begins = place_N[edges[:-1]].tolist()
        lengths = (place_N[edges[1:] - 1] + size - place_N[edges[:-1]]).tolist()
        for at in range(0, len(begins), _ANNOUNCED):
            requests = range(at, min(at + _ANNOUNCED, len(begins)))
            for request in requests:
                _announce(self._file, begins[request], lengths[request])
            for request in requests:
                self._take_run(out, ids_N, slice(*edges[request : request + 2].tolist()), begins[request])
        return out

    def _take_run(self, out: Array, ids_N: Array, run: slice, begin: int) -> None:
        count = int(ids_N[run.stop - 1] - ids_N[run.start]) + 1
        is_dense = count == run.stop - run.start
        rows = out[run] if is_dense else np.empty((count, *out.shape[1:]), out.dtype)
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            with naming(self._rows.path):
                read = os.preadv(self._file, [view[done:]], begin + done)
            if not read:
                raise self._short(begin + done)
            done += read
        if not is_dense:
            out[run] = rows[ids_N[run] - ids_N[run.start]]

    def _short(self, at: int) -> OSError:
        wanted = self._rows.offset + self._rows.row_bytes * self._rows.shape[0]
        return OSError(f"{self._rows.path} ends at byte {at} and had {wanted} when it was opened; copy it again")


def _opened(path: str, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it goes around the page cache."""
    with naming(path):
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        descriptor = os.open(path, os.O_RDONLY)
        if direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return descriptor, False


def _aligned(length: int) -> Array:
    room = np.empty(length + _ALIGNMENT, np.uint8)
    skipped = -room.ctypes.data % _ALIGNMENT
    aligned: Array = room[skipped : skipped + length]
    return aligned


def _drop(descriptor: int, begin: int, length: int) -> None:
    """Let the page cache forget a part of a file."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)


def _announce(descriptor: int, begin: int, length: int) -> None:
    """Have the system begin to read a part of a file."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_WILLNEED)

"""Rows of one or more arrays on disk, concatenated without copies."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.datastore.reading.file_rows import FileRows, RowReader
from fairseq.memory.types import Array
from fairseq.runtime.hardware import fits_in_ram

RowReaders = Sequence[RowReader | None]
"""A reader for each chunk; None for those that are read through the map."""


class ChunkedArray:
    """The keys of a store, (rows, dim) of a floating type, or its values, (rows,) of an integer type.

    The arrays are used in place, which for a memory map is on disk. numpy has no bfloat16: such arrays are uint16, the
    16 bits of each number. Mapped files that together take more than half of the RAM are read by explicit requests, not
    through the map (see ``reading/file_rows.py``).
    """

    def __init__(self, chunks: Sequence[Array], dtype: str | None = None, *, exceeds_ram: bool | None = None) -> None:
        """Concatenate ``chunks``, at least one, without copying.

        Args:
            dtype: name of their type; by default the arrays' dtype, so only bfloat16 needs it.
            exceeds_ram: read mapped files by explicit requests; by default if they take more than half of the RAM.
        Raises: ValueError with both values when the chunks differ in type or width.
        """
        # torch cannot view an array that runs backwards.
        self.chunks = tuple(c.copy() if min(c.strides, default=0) < 0 else c for c in chunks)
        first = self.chunks[0]
        for chunk in self.chunks[1:]:
            if chunk.dtype != first.dtype or chunk.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"rows of {_describe(first)} and of {_describe(chunk)} cannot be concatenated; convert one of the "
                    "stores"
                )
        self.dtype = dtype or str(first.dtype)
        self._tensors = [view_as(chunk, self.dtype) for chunk in self.chunks]
        self._edges = [0, *accumulate(len(chunk) for chunk in self.chunks)]
        if exceeds_ram is None:
            mapped = sum(chunk.nbytes for chunk in self.chunks if isinstance(chunk, np.memmap))
            exceeds_ram = bool(mapped) and not fits_in_ram(mapped)
        # Looked up now, while the names are surely those of the mapped files.
        self._file_rows = [FileRows.of(chunk) if exceeds_ram else None for chunk in self.chunks]

    @classmethod
    def of(cls, rows: Array | ChunkedArray) -> ChunkedArray:
        """Rows as they are, or those of one array."""
        return rows if isinstance(rows, ChunkedArray) else cls([rows])

    def __len__(self) -> int:
        return self._edges[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, dim) of keys, (rows,) of values."""
        return (len(self), *self.chunks[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.chunks[0].itemsize

    @property
    def exceeds_ram(self) -> bool:
        """True if rows are read by explicit requests, since the mapped files take more than half of the RAM."""
        return any(rows is not None for rows in self._file_rows)

    @contextmanager
    def opened(self, *, direct: bool) -> Iterator[RowReaders]:
        """Readers of a store that exceeds the RAM, for ``block``.

        Args:
            direct: go around the page cache; see ``FileRows.opened``.
        """
        with ExitStack() as files:
            yield [
                None if rows is None else files.enter_context(rows.opened(direct=direct)) for rows in self._file_rows
            ]

    @property
    def files(self) -> list[Path]:
        """The memory-mapped files; none for arrays in memory."""
        return [Path(str(chunk.filename)) for chunk in self.chunks if isinstance(chunk, np.memmap)]

    @property
    def single_array(self) -> Array | None:
        """The array, if it is the only one, of float32 and contiguous, so that its rows can be read in place."""
        first = self.chunks[0]
        return first if len(self.chunks) == 1 and self.dtype == "float32" and first.flags.c_contiguous else None

    def block(self, start: int, stop: int, readers: RowReaders | None = None) -> Tensor:
        """Rows from ``start`` to ``stop`` (not included, at most all) in their own type.

        A view of the array if they are within one chunk; it must not be written to.

        Args:
            readers: of ``opened``: read into memory of its own.
        """
        stop = min(stop, len(self))
        slices = []
        index = bisect_right(self._edges, start, hi=len(self.chunks)) - 1
        while start < stop:
            first, after = self._edges[index], min(stop, self._edges[index + 1])
            reader = readers[index] if readers else None
            if reader is None or after == start:
                slices.append(self._tensors[index][start - first : after - first])
            else:
                slices.append(view_as(reader.block(start - first, after - first), self.dtype))
            start, index = after, index + 1
        slices = [rows for rows in slices if len(rows)]
        if not slices:
            return self._tensors[0][:0]
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def take(self, ids_N: Tensor | Array) -> Tensor:
        """Rows in the requested order, as float32 (integers as int64). Each is read once, in the order of the files."""
        ids_N = ids_N if isinstance(ids_N, Tensor) else torch.from_numpy(np.ascontiguousarray(ids_N))
        # No disk is read, or all of a file is, in any order: sorting so many numbers takes longer than reading it.
        reads_all = len(ids_N) >= len(self) and not self.exceeds_ram
        if len(self.chunks) == 1 and (reads_all or not isinstance(self.chunks[0], np.memmap)):
            return self._tensors[0].index_select(0, ids_N).to(self._output_dtype)
        if len(ids_N) > 1 and not bool((ids_N[1:] > ids_N[:-1]).all()):
            unique_M, inverse_N = torch.unique(ids_N, return_inverse=True)
            return self.take(unique_M).index_select(0, inverse_N)
        assert not len(ids_N) or (int(ids_N[0]) >= 0 and int(ids_N[-1]) < len(self)), (ids_N, len(self))
        if len(self.chunks) == 1:
            return self._take_from(0, ids_N)
        positions = torch.searchsorted(ids_N, torch.tensor(self._edges)).tolist()
        blocks = [
            self._take_from(index, ids_N[low:high] - self._edges[index])
            for index, (low, high) in enumerate(zip(positions, positions[1:]))
            if high > low
        ]
        return torch.cat(blocks) if blocks else self._tensors[0][:0].to(self._output_dtype)

    def _take_from(self, index: int, ids_N: Tensor) -> Tensor:
        """Rows of one chunk, numbers ascending."""
        rows = self._file_rows[index]
        if rows is not None:
            with rows.opened(direct=False) as reader:
                if reader is not None:
                    return view_as(reader.take(ids_N.long().numpy()), self.dtype).to(self._output_dtype)
        # torch gathers with all threads and numpy with one.
        return self._tensors[index].index_select(0, ids_N).to(self._output_dtype)

    def in_memory(self) -> ChunkedArray:
        """The same rows read into one array."""
        return ChunkedArray([np.concatenate([np.asarray(chunk) for chunk in self.chunks])], self.dtype)

    @property
    def _output_dtype(self) -> torch.dtype:
        return torch.float32 if self._tensors[0].is_floating_point() else torch.int64

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All rows for numpy; bfloat16 as float32."""
        rows = self.block(0, len(self))
        array: Array = (rows.float() if rows.dtype is torch.bfloat16 else rows).numpy()
        return np.array(array, dtype, copy=True) if copy else np.asarray(array, dtype)


def as_tensor(array: Array) -> Tensor:
    """A tensor over the same memory; read-only maps are fine as long as it is not written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_storage_dtype(rows: Tensor | Array, dtype: str) -> Array:
    """Rows in a type of keys, as written to disk."""
    tensor = rows.detach().cpu() if isinstance(rows, Tensor) else as_tensor(np.ascontiguousarray(rows))
    tensor = tensor.to(getattr(torch, dtype)).contiguous()
    array: Array = (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()
    assert array.dtype == KEY_DTYPES[dtype]
    return array


def nonfinite(rows_ND: Tensor) -> Tensor:
    """Numbers of the rows that hold NaN or infinity, int64."""
    if not rows_ND.numel():
        return torch.empty(0, dtype=torch.int64)
    # One pass that writes nothing, several times as fast as the others, almost always shows that there is none.
    if all(bool(bound.isfinite()) for bound in rows_ND.aminmax()):
        return torch.empty(0, dtype=torch.int64)
    return (~(rows_ND.amin(dim=1).isfinite() & rows_ND.amax(dim=1).isfinite())).nonzero()[:, 0]


def view_as(array: Array, dtype: str) -> Tensor:
    """A tensor of the named type over the same memory."""
    tensor = as_tensor(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _describe(chunk: Array) -> str:
    width = "" if chunk.ndim == 1 else f" and width {chunk.shape[1]}"
    return f"type {chunk.dtype}{width}"

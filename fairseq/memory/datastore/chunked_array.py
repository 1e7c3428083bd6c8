"""Rows of one or more arrays on disk, one after the other, without copies."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.types import Array


class ChunkedArray:
    """The keys of a store, (rows, dim) of a floating type, or its values, (rows,) of an integer type.

    The arrays are used where they are, which for a memory map is on disk. numpy knows no bfloat16: such arrays are
    uint16, the 16 bits of each number.
    """

    def __init__(self, parts: Sequence[Array], dtype: str | None = None) -> None:
        """Concatenate ``parts``, at least one, without copying.

        Args:
            dtype: name of their type; by default what the arrays say, so it is needed for bfloat16 alone.
        Raises: ValueError with both values when the parts differ in type or width.
        """
        self.parts = tuple(parts)
        first = self.parts[0]
        for part in self.parts[1:]:
            if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"rows of {_kind(first)} and of {_kind(part)} cannot be concatenated; convert one of the stores"
                )
        self.dtype = dtype or str(first.dtype)
        self._tensors = [view_as(part, self.dtype) for part in self.parts]
        self._edges = [0, *accumulate(len(part) for part in self.parts)]

    @classmethod
    def of(cls, rows: Array | ChunkedArray) -> ChunkedArray:
        """Rows as they are, or those of one array."""
        return rows if isinstance(rows, ChunkedArray) else cls([rows])

    def __len__(self) -> int:
        return self._edges[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, dim) of keys, (rows,) of values."""
        return (len(self), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """The files that are mapped; none of what is in memory."""
        return [Path(str(part.filename)) for part in self.parts if isinstance(part, np.memmap)]

    @property
    def single_array(self) -> Array | None:
        """The one array, if that is all and its type float32, so that its rows can be read in place."""
        return self.parts[0] if len(self.parts) == 1 and self.dtype == "float32" else None

    def block(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` to ``stop`` (not included, at most all) in their own type.

        A view of the array when they are within one part. Nobody may write into it.
        """
        stop = min(stop, len(self))
        pieces = []
        number = bisect_right(self._edges, start, hi=len(self.parts)) - 1
        while start < stop:
            first, after = self._edges[number], min(stop, self._edges[number + 1])
            pieces.append(self._tensors[number][start - first : after - first])
            start, number = after, number + 1
        pieces = [piece for piece in pieces if len(piece)]
        if not pieces:
            return self._tensors[0][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def take(self, ids_N: Tensor | Array) -> Tensor:
        """Some rows in the order asked for, as float32 (integers as int64). Each is read once, in the files' order."""
        ids_N = ids_N if isinstance(ids_N, Tensor) else torch.from_numpy(np.ascontiguousarray(ids_N))
        if len(self.parts) == 1 and not isinstance(self.parts[0], np.memmap):  # nothing is read from a disk
            return self._tensors[0].index_select(0, ids_N).to(self._taken_as)
        if len(ids_N) > 1 and not bool((ids_N[1:] > ids_N[:-1]).all()):
            unique_M, inverse_N = torch.unique(ids_N, return_inverse=True)
            return self.take(unique_M).index_select(0, inverse_N)
        assert not len(ids_N) or (int(ids_N[0]) >= 0 and int(ids_N[-1]) < len(self)), (ids_N, len(self))
        dtype = self._taken_as
        # torch gathers with all threads and numpy with one.
        if len(self.parts) == 1:
            return self._tensors[0].index_select(0, ids_N).to(dtype)
        places = torch.searchsorted(ids_N, torch.tensor(self._edges)).tolist()
        found = [
            tensor.index_select(0, ids_N[low:high] - first).to(dtype)
            for tensor, first, low, high in zip(self._tensors, self._edges, places, places[1:])
            if high > low
        ]
        return torch.cat(found) if found else self._tensors[0][:0].to(dtype)

    def in_memory(self) -> ChunkedArray:
        """The same rows read into one array."""
        return ChunkedArray([np.concatenate([np.asarray(part) for part in self.parts])], self.dtype)

    @property
    def _taken_as(self) -> torch.dtype:
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
    """Rows in a type of keys, as they are written."""
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


def _kind(part: Array) -> str:
    width = "" if part.ndim == 1 else f" and width {part.shape[1]}"
    return f"type {part.dtype}{width}"

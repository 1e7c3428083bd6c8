"""Products of the few rows of a decoding step with a large matrix that is packed once, at the rate of its reading.

The libraries' products of 32 rows read the matrix and multiply in turn. Here the next columns are fetched meanwhile.
Threads share the panels.

Layout: a matrix is packed in panels of ``PANEL`` of its rows, the types; a panel has them column by column, filled up
with zeros. Rows of states are multiplied by tiles of so many rows that the sums stay in registers.

Shapes: R rows, D width, V types, K panels, P numbers of all panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from fairseq.generation.steps.team_kernels import run_in_team, take
from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.numba_library import cgutils, compiler_features, numba, types
from fairseq.memory.index.ops.vector_kernels import fetch_line

_FEATURES = compiler_features()
IS_FAST = bool(_FEATURES & {"avx512f", "fma"})
"""The compiler knows a CPU's vectors that these tiles are made for."""
_LANES, _SIZES = (16, (12, 8, 4, 2, 1)) if "avx512f" in _FEATURES else (8, (6, 4, 2, 1, 1))
"""Numbers of a vector, and rows of a tile: the largest one fills 32 registers, or 16."""
_VECTORS = 2
PANEL = _LANES * _VECTORS
"""Types of a panel."""
_LINE = 16  # numbers of a cache line
_TURNS = 4  # of each thread: one that is interrupted leaves the rest to others
_COLUMNS = 192  # of all rows and of a panel, which the first level holds; their sums are added up
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


def _fetch_to_write(typing_context: Any, out_P: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        base = context.make_array(signature.args[0])(context, builder, given[0]).data
        for line in range(_VECTORS + 1):  # a row may begin anywhere in a line
            at = builder.gep(base, [builder.add(given[1], ir.Constant(given[1].type, line * _LINE))])
            fetch_line(builder, at, to_write=True, level=1)
        return context.get_dummy_value()

    return types.void(out_P, types.intp), generate


fetch_to_write: Any = numba.extending.intrinsic(_fetch_to_write)
"""Fetch the lines of a panel's types from ``out_P[place]`` on, which will be written."""


class _Tile:
    """Writes the loop over the columns for R rows and the types of a panel."""

    def __init__(self, builder: Any, rows: int, size: Any) -> None:
        self._builder, self._rows, self._size = builder, rows, size
        self._vector = ir.VectorType(_FLOAT, _LANES)

    def _number(self, value: int) -> Any:
        return ir.Constant(self._size, value)

    def _at(self, base: Any, *offsets: Any) -> Any:
        for offset in offsets:
            base = self._builder.gep(base, [offset], inbounds=True)
        return base

    def _vector_at(self, base: Any, *offsets: Any) -> Any:
        return self._builder.bitcast(self._at(base, *offsets), self._vector.as_pointer())

    def sum_up(
        self, row_at: Any, stride: Any, panel_at: Any, width: Any, ahead_at: Any, step: Any, out_at: Any
    ) -> None:
        """Add to the sums, row after row; meanwhile fetch what is ``ahead``, so many numbers for each column."""
        builder = self._builder
        sums = [[cgutils.alloca_once(builder, self._vector) for _ in range(_VECTORS)] for _ in range(self._rows)]
        for total in (total for row in sums for total in row):
            builder.store(ir.Constant(self._vector, [0.0] * _LANES), total)
        one = self._number(1)
        rows = [self._at(row_at, builder.mul(stride, self._number(number))) for number in range(self._rows)]
        with cgutils.for_range_slice(builder, self._number(0), width, one) as (column, _):
            self._fetch(self._at(ahead_at, builder.mul(column, step)))
            panel = self._at(panel_at, builder.mul(column, self._number(PANEL)))
            places = [self._number(v * _LANES) for v in range(_VECTORS)]
            types_ = [builder.load(self._vector_at(panel, place), align=4) for place in places]
            for row, totals in zip(rows, sums):
                state = self._everywhere(builder.load(self._at(row, column)))
                for of_types, total in zip(types_, totals):
                    builder.store(self._fused(state, of_types, builder.load(total)), total)
        for number, totals in enumerate(sums):
            for v, total in enumerate(totals):
                to = self._vector_at(out_at, self._number(number * PANEL + v * _LANES))
                builder.store(builder.fadd(builder.load(to, align=4), builder.load(total)), to, align=4)

    def _fetch(self, at: Any) -> None:
        """Both lines, into the second level: a whole panel is more than the first one holds."""
        for line in range(_VECTORS):
            fetch_line(self._builder, self._at(at, self._number(line * _LINE)), to_write=False, level=2)

    def _fused(self, a: Any, b: Any, c: Any) -> Any:
        kind = ir.FunctionType(self._vector, [self._vector] * 3)
        fma = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.fma.v{_LANES}f32")
        return self._builder.call(fma, [a, b, c])

    def _everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(self._vector, ir.Undefined)
        first = self._builder.insert_element(nothing, value, ir.Constant(_INT, 0))
        mask = ir.Constant(ir.VectorType(_INT, _LANES), [0] * _LANES)
        return self._builder.shuffle_vector(first, nothing, mask)


def _tile(rows: int) -> Any:
    """The intrinsic ``(row_X, row, stride, panel_P, panel, D, ahead, step, out_X)`` for tiles of so many rows.

    It adds the products of the rows that begin at ``row_X[row]``, ``stride`` numbers apart, with the types of the panel
    that begins at ``panel_P[panel]`` to ``out_X``, and fetches ``step`` numbers for each column from ``panel_P[ahead]``
    on.
    """

    def typed(typing_context: Any, row_X: Any, row: Any, stride: Any, panel_P: Any, panel: Any, width: Any, ahead: Any,
              step: Any, out_X: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            rows_at, panels_at, out_at = (
                context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 3, 8)
            )
            row_at, panel_at = (
                builder.gep(base, [given[i]], inbounds=True) for base, i in ((rows_at, 1), (panels_at, 4))
            )
            ahead_at = builder.gep(panels_at, [given[6]])  # beyond the end for the last panel, which fetching permits
            tile = _Tile(builder, rows, given[5].type)
            tile.sum_up(row_at, given[2], panel_at, given[5], ahead_at, given[7], out_at)
            return context.get_dummy_value()

        size = types.intp
        return types.void(row_X, size, size, panel_P, size, size, size, size, out_X), generate

    return numba.extending.intrinsic(typed)


_tile_0, _tile_1, _tile_2, _tile_3, _tile_4 = map(_tile, _SIZES)
_size_0, _size_1, _size_2, _size_3, _size_4 = _SIZES


@compiled()
def _size_of(left: int) -> int:
    """Rows of the next tile, of those that are left."""
    if left >= _size_0:
        return _size_0
    if left >= _size_1:
        return _size_1
    if left >= _size_2:
        return _size_2
    return _size_3 if left >= _size_3 else _size_4


@compiled()
def _add(
    size: int,
    row_X: Any,
    row: int,
    stride: int,
    panel_P: Any,
    panel: int,
    width: int,
    ahead: int,
    step: int,
    out_X: Any,
) -> None:  # fmt: skip
    if size == _size_0:
        _tile_0(row_X, row, stride, panel_P, panel, width, ahead, step, out_X)
    elif size == _size_1:
        _tile_1(row_X, row, stride, panel_P, panel, width, ahead, step, out_X)
    elif size == _size_2:
        _tile_2(row_X, row, stride, panel_P, panel, width, ahead, step, out_X)
    elif size == _size_3:
        _tile_3(row_X, row, stride, panel_P, panel, width, ahead, step, out_X)
    else:
        _tile_4(row_X, row, stride, panel_P, panel, width, ahead, step, out_X)


@compiled("u8(u4[::1])")
def mixed_sum(bits_X: Any) -> Any:
    """A sum over all numbers, each mixed with its place, so that any change leaves it the same only by chance."""
    total = np.uint64(0)
    for x in range(len(bits_X)):
        key = np.uint32(np.uint32(x) * np.uint32(0x9E3779B1))  # a multiple of the golden ratio, as hashes have it
        key = np.uint32(key ^ (key >> np.uint32(15)))
        mixed = np.uint32(np.uint32(bits_X[x] ^ key) * np.uint32(0x85EBCA6B))
        mixed = np.uint32(mixed ^ (mixed >> np.uint32(13)))
        total += np.uint64(mixed) * np.uint64(np.uint32(key | np.uint32(1)))
    return total


@compiled()
def _work(row_RD: Any, panel_KX: Any, bias_V: Any, sum_PX: Any, next_2: Any, turn: int, step: int, out_RV: Any) -> None:
    """Multiply panels, so many at a time, until there are none left."""
    (count, width), num_types, panels = row_RD.shape, out_RV.shape[1], len(panel_KX)
    row_X, panel_P, out_P = row_RD.reshape(-1), panel_KX.reshape(-1), out_RV.reshape(-1)
    out_X = sum_PX[take(next_2, 1, 1)]
    while True:
        start = take(next_2, 0, turn)
        if start >= panels:
            break
        for panel in range(start, min(start + turn, panels)):
            out_X[:] = np.float32(0.0)
            for i in range(count):  # a line that is not there delays what writes it: a fifth of the time
                fetch_to_write(out_P, i * num_types + panel * PANEL)
            for d in range(0, width, _COLUMNS):
                columns, at, first, fetched = min(_COLUMNS, width - d), (panel * width + d) * PANEL, 0, 0
                while first < count:
                    size, ahead = _size_of(count - first), at + PANEL * width + fetched * columns
                    row = first * width + d
                    _add(size, row_X, row, width, panel_P, at, columns, ahead, step, out_X[first * PANEL :])
                    first, fetched = first + size, min(fetched + step, PANEL)
            for i in range(count):
                for j in range(min(PANEL, num_types - panel * PANEL)):
                    v = panel * PANEL + j
                    out_RV[i, v] = out_X[i * PANEL + j] + (bias_V[v] if len(bias_V) else np.float32(0.0))


@compiled("(f4[:,::1], f4[:,::1], f4[::1], f4[:,::1], i8, i8)")
def multiply(row_RD: Any, panel_KX: Any, bias_V: Any, out_RV: Any, team: int, num_threads: int) -> None:
    """Write the products of all rows with all types, plus the bias.

    Args:
        panel_KX: the matrix, a panel in each row.
        bias_V: of each type; of none where there is no bias.
        team: address of OpenMP's ``GOMP_parallel``, for more than one thread.
    """
    count, panels, first, tiles = len(row_RD), len(panel_KX), 0, 0
    while first < count:
        first, tiles = first + _size_of(count - first), tiles + 1
    step = max(1, -(-PANEL // (tiles * _LINE))) * _LINE  # of the next panel, for each tile and column
    sum_PX, next_2 = np.empty((num_threads, count * PANEL), np.float32), np.zeros(2, np.int64)
    if num_threads > 1:
        turn = max(1, panels // (_TURNS * num_threads))
        run_in_team(_work, team, num_threads, (row_RD, panel_KX, bias_V, sum_PX, next_2, turn, step, out_RV))
    else:
        _work(row_RD, panel_KX, bias_V, sum_PX, next_2, panels, step, out_RV)

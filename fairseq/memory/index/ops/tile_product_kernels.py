"""Products of a few rows of 8-bit integers with 64 others, and their comparison, as a compiled kernel calls them.

The loops, and how keys are laid out, are those of ``tile_loop_kernels``.

Shapes: R rows of a tile, Q rows, M keys, E columns (a multiple of 8).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, numba, types
from fairseq.memory.index.ops.tile_loop_kernels import (
    LANES,
    MATRIX_SIDE,
    MATRIX_STEP,
    TILE_KEYS,
    call_intrinsic,
    is_matrix,
    write_tile,
)

_BYTE, _INT = ir.IntType(8), ir.IntType(32)


@functools.cache
def tile_registers(name: str) -> tuple[Any, Any]:
    """Two intrinsics without arguments: to be called before the first tile of an instruction set, and after the last.

    AMX's registers have a shape to be set, and are to be given back; the others' do nothing.
    """
    has_shape = is_matrix(name)

    def before(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            if has_shape:
                # Palette 1; from byte 16 on the bytes of a row, from 48 on the rows, of each of 8 registers.
                shape = [1, *[0] * 15, *[MATRIX_STEP, 0] * 8, *[0] * 16, *[MATRIX_SIDE] * 8, *[0] * 8]
                kind = ir.ArrayType(_BYTE, len(shape))
                held = cgutils.alloca_once_value(builder, ir.Constant(kind, [ir.Constant(_BYTE, x) for x in shape]))
                call_intrinsic(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(held, _BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(), generate

    def after(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            if has_shape:
                call_intrinsic(builder, "llvm.x86.tilerelease", ir.VoidType())
            return context.get_dummy_value()

        return types.void(), generate

    return numba.extending.intrinsic(before), numba.extending.intrinsic(after)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of so many vectors as they have lanes: each step interleaves the first half with the second."""
    count = len(rows)
    low = [place for i in range(count // 2) for place in (i, count + i)]
    masks = [ir.Constant(ir.VectorType(_INT, count), [first + i for i in low]) for first in (0, count // 2)]
    for _ in range(count.bit_length() - 1):
        pairs = zip(rows[: count // 2], rows[count // 2 :])
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return rows


def _interleave(typing_context: Any, row_LE: Any, key_B: Any, first: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rows, keys = (context.make_array(signature.args[i])(context, builder, given[i]) for i in range(2))
        columns, size, group = builder.extract_value(rows.shape, 1), given[2].type, ir.VectorType(_INT, LANES)
        step = ir.Constant(size, 4 * LANES)
        with cgutils.for_range_slice(builder, ir.Constant(size, 0), columns, step) as (at, _):
            fours = []
            for number in range(LANES):
                place = builder.add(builder.mul(columns, ir.Constant(size, number)), at)
                row = builder.gep(rows.data, [place], inbounds=True)
                fours.append(builder.load(builder.bitcast(row, group.as_pointer()), align=1))
            for number, four in enumerate(_transposed(builder, fours)):
                place = builder.add(builder.mul(at, ir.Constant(size, LANES)), ir.Constant(size, 4 * LANES * number))
                out = builder.gep(keys.data, [builder.add(given[2], place)], inbounds=True)
                builder.store(four, builder.bitcast(out, group.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(row_LE, key_B, types.intp), generate


interleave: Any = numba.extending.intrinsic(_interleave)
"""``(row_LE, key_B, first)``: write 16 rows, of a multiple of 64 columns, interleaved from ``key_B[first]`` on."""

_CONTRACT = ("contract",)


class _Bounds:
    """Writes the comparison of a tile's bounds with what they have to reach; see :func:`reaching_rows`."""

    def __init__(self, builder: Any, lanes: int, kind: Any, key_at: list[Any], row_at: Any, columns: int) -> None:
        self._builder, self._lanes, self._kind, self._key_at, self._row_at = builder, lanes, kind, key_at, row_at
        self._columns = columns
        self._floats = ir.VectorType(ir.FloatType(), lanes)

    def _load(self, base: Any, place: int, kind: Any) -> Any:
        at = self._builder.gep(base, [ir.Constant(ir.IntType(64), place)], inbounds=True)
        return self._builder.load(self._builder.bitcast(at, kind.as_pointer()), align=4)

    def _fused(self, a: Any, b: Any, c: Any) -> Any:
        return self._builder.fadd(self._builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def reached(self, out_at: Any, row: int) -> Any:
        """64 bits: which of the row's bounds reach what they must."""
        builder, whole = self._builder, ir.IntType(64)
        places = range(self._columns * row, self._columns * row + 4)
        scale, zero, width, reach = (self._everywhere(self._load(self._row_at, i, ir.FloatType())) for i in places)
        found = ir.Constant(whole, 0)
        for place in range(0, TILE_KEYS, self._lanes):
            step, weight, size, bias = (self._load(base, place, self._floats) for base in self._key_at)
            raw = self._load(out_at, TILE_KEYS * row + place, ir.VectorType(self._kind, self._lanes))
            raw = builder.sitofp(raw, self._floats) if self._kind == _INT else raw
            product = self._fused(builder.fadd(raw, zero), step, weight)
            bound = self._fused(product, scale, self._fused(size, width, bias))
            here = builder.bitcast(builder.fcmp_ordered(">=", bound, reach), ir.IntType(self._lanes))
            found = builder.or_(found, builder.shl(builder.zext(here, whole), ir.Constant(whole, place)))
        return found

    def _everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(self._floats, ir.Undefined)
        first = self._builder.insert_element(nothing, value, ir.Constant(_INT, 0))
        return self._builder.shuffle_vector(
            first, nothing, ir.Constant(ir.VectorType(_INT, self._lanes), [0] * self._lanes)
        )


@functools.cache
def reaching_keys(lanes: int, rows: int, columns: int = 4) -> Any:
    """The intrinsic ``(raw_RX, row_Q4, first, step_M, weight_M, size_M, bias_M, key, hit_R)`` for a tile of products.

    It writes 64 bits for each row: which keys' bounds reach the row's fourth number (see ``bounded_scores``). Rows have
    so many columns.
    Returns: a bit for each row: whether any does.
    """

    def typed(typing_context: Any, raw_RX: Any, row_Q4: Any, first: Any, step: Any, weight: Any, size: Any, bias: Any,
              key: Any, hit_R: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            made = [context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 1, 3, 4, 5, 6, 8)]
            raw_at, rows_at, *keys_at, hit_at = [array.data for array in made]
            key_at = [builder.gep(base, [given[7]], inbounds=True) for base in keys_at]
            place = builder.mul(given[2], ir.Constant(given[2].type, columns))
            row_at = builder.gep(rows_at, [place], inbounds=True)
            kind = _INT if signature.args[0].dtype == types.int32 else ir.FloatType()
            bounds, any_hit = _Bounds(builder, lanes, kind, key_at, row_at, columns), ir.Constant(ir.IntType(64), 0)
            for row in range(rows):
                found = bounds.reached(raw_at, row)
                builder.store(found, builder.gep(hit_at, [ir.Constant(given[2].type, row)], inbounds=True))
                is_hit = builder.icmp_unsigned("!=", found, ir.Constant(found.type, 0))
                any_hit = builder.or_(
                    any_hit, builder.shl(builder.zext(is_hit, found.type), ir.Constant(found.type, row))
                )
            return any_hit

        size_ = types.intp
        return types.int64(raw_RX, row_Q4, size_, step, weight, size, bias, size_, hit_R), generate

    return numba.extending.intrinsic(typed)


def _lowest_bit(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


lowest_bit: Any = numba.extending.intrinsic(_lowest_bit)
"""Place of the lowest bit that is set; there must be one."""


@functools.cache
def tile_products(name: str, rows: int, keys: int = TILE_KEYS) -> Any:
    """The intrinsic ``(row_QE, first, key_B, byte, E, start_M, key, out_RX)`` of an instruction set.

    It writes ``start_M[key + j]`` plus the product of row ``first + i`` with the j-th of the 64 interleaved keys that
    begin at ``key_B[byte]`` to ``out_RX[i, j]``, for i below ``rows`` and j below ``keys`` (32 or 64).
    """

    def typed(typing_context: Any, row_QE: Any, first: Any, key_B: Any, byte: Any, columns: Any, start_M: Any,
              key: Any, out_RX: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            made = {i: context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 2, 5, 7)}
            stride = builder.extract_value(made[0].strides, 0)
            row_at = []
            for number in range(rows):
                offset = builder.mul(builder.add(given[1], ir.Constant(given[1].type, number)), stride)
                row_at.append(builder.gep(made[0].data, [offset], inbounds=True))
            keys_at = builder.gep(made[2].data, [given[3]], inbounds=True)
            start_at = builder.gep(made[5].data, [given[6]], inbounds=True)
            tile = write_tile(name, builder, row_at, stride, keys_at, given[4], keys)
            tile.sum_up(start_at, made[7].data, builder.extract_value(made[7].strides, 0))
            return context.get_dummy_value()

        size = types.intp
        return types.void(row_QE, size, key_B, size, size, start_M, size, out_RX), generate

    return numba.extending.intrinsic(typed)

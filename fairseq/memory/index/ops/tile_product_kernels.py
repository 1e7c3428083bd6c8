"""Products of a few rows of 8-bit integers with 64 others, in the instructions that processors have for them.

Compilers do not find these instructions in a loop. Hence the loop is written down in the compiler's own language, once,
with one small part for each instruction set (``INSTRUCTIONS``). All sum the same integers, so that the result is the
same to the last bit.

Layout: a row's entries have ``zero`` added, so that they are unsigned where the instruction wants that. Keys are signed
and *interleaved*: in groups of 16 keys, of each four columns at a time, so that one load has four columns of 16 keys.

Shapes: R rows of a tile, Q rows, M keys, E columns (a multiple of 8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, numba, types

LANES = 16
"""Keys that are interleaved."""
TILE_KEYS = 64
COLUMN_STEP = 8
"""Columns are multiplied by so many at a time."""
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)


@dataclass(frozen=True)
class Instructions:
    """How an instruction set multiplies; ``rows`` x ``vectors`` sums are held in registers."""

    rows: int
    vectors: int
    lanes: int
    """Sums of 32 bits in a vector."""
    levels: int
    """Largest size of an entry."""
    zero: int
    """What is added to the entries of a row."""
    add_products: Callable[[Any, Any, list[Any], list[Any]], Any]
    """(builder, sums, row, keys) -> sums; row and keys are two vectors of four columns for each lane."""


def _call(builder: Any, name: str, result: Any, *given: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [x.type for x in given]), name)
    return builder.call(function, given)


def _constant(like: Any, value: int) -> Any:
    return ir.Constant(like.type, [value] * like.type.count)


def _by_four(name: str) -> Callable[[Any, Any, list[Any], list[Any]], Any]:
    """One instruction that adds four products to each lane; ``name`` takes lanes of 32 bits."""

    def add(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
        for a, b in zip(row, keys):
            sums = _call(builder, name, sums.type, sums, a, b)
        return sums

    return add


def _by_sdot(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    as_bytes = ir.VectorType(_BYTE, 16)
    for a, b in zip(row, keys):
        given = (sums, builder.bitcast(a, as_bytes), builder.bitcast(b, as_bytes))
        sums = _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, *given)
    return sums


def _by_pairs(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    """Pairs of products in 16 bits, which have room for two pairs of products of 7-bit numbers (2 * 2 * 127 * 63)."""
    as_bytes, as_words = ir.VectorType(_BYTE, 32), ir.VectorType(_WORD, 16)
    pairs = [
        _call(
            builder, "llvm.x86.avx2.pmadd.ub.sw", as_words, builder.bitcast(a, as_bytes), builder.bitcast(b, as_bytes)
        )
        for a, b in zip(row, keys)
    ]
    both = builder.add(*pairs)
    return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, both, _constant(both, 1)))


def _one_by_one(builder: Any, sums: Any, row: list[Any], keys: list[Any], *, signed: bool = False) -> Any:
    """What every processor can do."""
    for a, b in zip(row, keys):
        for place in range(4):
            entry, key = (builder.shl(x, _constant(x, 24 - 8 * place)) for x in (a, b))
            entry = (builder.ashr if signed else builder.lshr)(entry, _constant(a, 24))
            sums = builder.add(sums, builder.mul(entry, builder.ashr(key, _constant(b, 24))))
    return sums


INSTRUCTIONS = {
    "avx512_vnni": Instructions(6, 4, 16, 127, 128, _by_four("llvm.x86.avx512.vpdpbusd.512")),
    "avx_vnni": Instructions(4, 2, 8, 127, 128, _by_four("llvm.x86.avx512.vpdpbusd.256")),
    "avx2": Instructions(4, 2, 8, 63, 64, _by_pairs),
    "asimddp": Instructions(4, 4, 4, 127, 0, _by_sdot),
    "plain": Instructions(4, 1, 16, 127, 128, _one_by_one),
}
"""By the processor's name of the feature; ``plain`` needs none."""


def without_instructions(kind: Instructions) -> Instructions:
    """The same sums on a processor that lacks the instructions, for tests."""
    return replace(kind, add_products=functools.partial(_one_by_one, signed=kind.zero == 0))


class _Tile:
    """Writes the loops for one tile: R rows with 64 keys."""

    def __init__(self, kind: Instructions, builder: Any, row_at: list[Any], keys_at: Any, columns: Any) -> None:
        self._kind, self._builder, self._row_at, self._keys_at, self._columns = kind, builder, row_at, keys_at, columns
        self._size, self._sums = columns.type, ir.VectorType(_INT, kind.lanes)

    def _number(self, value: int) -> Any:
        return ir.Constant(self._size, value)

    def _pointer(self, base: Any, offset: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(base, [offset], inbounds=True), kind.as_pointer())

    def sum_up(self, start_at: Any, out_at: Any) -> None:
        """Write ``start`` plus all products: 64 sums of 32 bits for each row, row after row."""
        kind, builder = self._kind, self._builder
        for first in range(0, TILE_KEYS // kind.lanes, kind.vectors):
            places = [self._number((first + v) * kind.lanes) for v in range(kind.vectors)]
            held = []
            for _ in self._row_at:
                held.append([cgutils.alloca_once(builder, self._sums) for _ in places])
                for place, total in zip(places, held[-1]):
                    builder.store(builder.load(self._pointer(start_at, place, self._sums), align=4), total)
            with cgutils.for_range_slice(builder, self._number(0), self._columns, self._number(COLUMN_STEP)) as (at, _):
                self._add(at, [(first + v) * kind.lanes for v in range(kind.vectors)], held)
            for number, totals in enumerate(held):
                for place, total in zip(places, totals):
                    to = builder.add(place, self._number(number * TILE_KEYS))
                    builder.store(builder.load(total), self._pointer(out_at, to, self._sums), align=4)

    def _add(self, column: Any, lanes: list[int], held: list[list[Any]]) -> None:
        """Add the products of eight columns to what is held."""
        builder, halves = self._builder, (0, COLUMN_STEP // 2)
        keys = []
        for lane in lanes:
            group = builder.mul(self._columns, self._number(lane // LANES * LANES))
            base = builder.add(group, self._number(lane % LANES * 4))
            both = []
            for half in halves:
                at = builder.mul(builder.add(column, self._number(half)), self._number(LANES))
                both.append(builder.load(self._pointer(self._keys_at, builder.add(base, at), self._sums), align=4))
            keys.append(both)
        for row_at, totals in zip(self._row_at, held):
            row = []
            for half in halves:
                four = self._pointer(row_at, builder.add(column, self._number(half)), _INT)
                row.append(self._everywhere(builder.load(four, align=1)))
            for both, total in zip(keys, totals):
                builder.store(self._kind.add_products(builder, builder.load(total), row, both), total)

    def _everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(self._sums, ir.Undefined)
        first = self._builder.insert_element(nothing, value, ir.Constant(_INT, 0))
        mask = ir.Constant(ir.VectorType(_INT, self._kind.lanes), [0] * self._kind.lanes)
        return self._builder.shuffle_vector(first, nothing, mask)


_CONTRACT = ("contract",)


class _Bounds:
    """Writes the comparison of a tile's bounds with what they have to reach; see :func:`reaching_rows`."""

    def __init__(self, builder: Any, lanes: int, kind: Any, key_at: list[Any], row_at: Any) -> None:
        self._builder, self._lanes, self._kind, self._key_at, self._row_at = builder, lanes, kind, key_at, row_at
        self._floats = ir.VectorType(ir.FloatType(), lanes)

    def _load(self, base: Any, place: int, kind: Any) -> Any:
        at = self._builder.gep(base, [ir.Constant(ir.IntType(64), place)], inbounds=True)
        return self._builder.load(self._builder.bitcast(at, kind.as_pointer()), align=4)

    def _fused(self, a: Any, b: Any, c: Any) -> Any:
        return self._builder.fadd(self._builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def reached(self, out_at: Any, row: int) -> Any:
        """64 bits: which of the row's bounds reach what they must."""
        builder, whole = self._builder, ir.IntType(64)
        numbers = [self._everywhere(self._load(self._row_at, 4 * row + i, ir.FloatType())) for i in range(4)]
        scale, zero, width, reach = numbers
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
def reaching_keys(lanes: int, rows: int) -> Any:
    """The intrinsic ``(raw_X, row_Q4, first, step_M, weight_M, size_M, bias_M, key, hit_R)`` for a tile of products.

    It writes 64 bits for each row: which keys' bounds reach the row's fourth number (see ``bounded_scores``).
    Returns: a number that is not zero if any does.
    """

    def typed(typing_context: Any, raw_X: Any, row_Q4: Any, first: Any, step: Any, weight: Any, size: Any, bias: Any,
              key: Any, hit_R: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            made = [context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 1, 3, 4, 5, 6, 8)]
            raw_at, rows_at, *keys_at, hit_at = [array.data for array in made]
            key_at = [builder.gep(base, [given[7]], inbounds=True) for base in keys_at]
            four = builder.mul(given[2], ir.Constant(given[2].type, 4))
            row_at = builder.gep(rows_at, [four], inbounds=True)
            kind = _INT if signature.args[0].dtype == types.int32 else ir.FloatType()
            bounds, any_hit = _Bounds(builder, lanes, kind, key_at, row_at), ir.Constant(ir.IntType(64), 0)
            for row in range(rows):
                found = bounds.reached(raw_at, row)
                builder.store(found, builder.gep(hit_at, [ir.Constant(given[2].type, row)], inbounds=True))
                any_hit = builder.or_(any_hit, found)
            return any_hit

        size_ = types.intp
        return types.int64(raw_X, row_Q4, size_, step, weight, size, bias, size_, hit_R), generate

    return numba.extending.intrinsic(typed)


def _lowest_bit(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


lowest_bit: Any = numba.extending.intrinsic(_lowest_bit)
"""Place of the lowest bit that is set; there must be one."""


@functools.cache
def tile_products(name: str, rows: int) -> Any:
    """The intrinsic ``(row_QE, first, key_B, byte, E, start_M, key, out_X)`` of an instruction set.

    It writes ``start_M[key + j]`` plus the product of row ``first + i`` with the j-th of the 64 interleaved keys that
    begin at ``key_B[byte]`` to ``out_X[64 * i + j]``, for i below ``rows``.
    """
    kind = INSTRUCTIONS[name]

    def typed(typing_context: Any, row_QE: Any, first: Any, key_B: Any, byte: Any, columns: Any, start_M: Any,
              key: Any, out_X: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            made = {i: context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 2, 5, 7)}
            stride = builder.extract_value(made[0].strides, 0)
            row_at = []
            for number in range(rows):
                offset = builder.mul(builder.add(given[1], ir.Constant(given[1].type, number)), stride)
                row_at.append(builder.gep(made[0].data, [offset], inbounds=True))
            keys_at = builder.gep(made[2].data, [given[3]], inbounds=True)
            start_at = builder.gep(made[5].data, [given[6]], inbounds=True)
            _Tile(kind, builder, row_at, keys_at, given[4]).sum_up(start_at, made[7].data)
            return context.get_dummy_value()

        size = types.intp
        return types.void(row_QE, size, key_B, size, size, start_M, size, out_X), generate

    return numba.extending.intrinsic(typed)

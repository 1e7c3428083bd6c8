"""Products of a few rows of 8-bit integers with 64 others, in the instructions that processors have for them.

Compilers do not find these instructions in a loop. Hence the loop is written down in the compiler's own language, once,
with one small part for each instruction set (``INSTRUCTIONS``). All sum the same integers, so that the result is the
same to the last bit.

Layout: a row's entries have ``zero`` added, so that they are unsigned where the instruction wants that. Keys are signed
and *interleaved*: in groups of 16 keys, of each four columns at a time, so that one load has four columns of 16 keys.

*Fine* entries have six bits more: 64 times a first part, plus a second of -64 to 62. The first half of the columns are
first parts, the second half second ones. Sums are a 64th of the product, but for that of second parts with each other,
which is left out (``bounded_scores`` has its bound).

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
FINE_BITS = 6
FINE = 1 << FINE_BITS
"""First parts of fine entries count so many times as much as second ones."""
FINE_SUFFIX = "_fine"
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
    add_products: Any
    """(builder, sums, row, keys) -> sums; row and keys are two vectors of four columns for each lane. None where sums
    are whole matrices (``_MatrixTile``)."""
    column_step: int = COLUMN_STEP
    """Columns are a multiple of it."""
    is_fine: bool = False
    """Entries have two parts."""


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
    "amx_int8": Instructions(32, 2, 16, 127, 0, None, 64),
    "avx512_vnni": Instructions(6, 4, 16, 127, 128, _by_four("llvm.x86.avx512.vpdpbusd.512")),
    "avx_vnni": Instructions(4, 2, 8, 127, 128, _by_four("llvm.x86.avx512.vpdpbusd.256")),
    "avx2": Instructions(4, 2, 8, 63, 64, _by_pairs),
    "asimddp": Instructions(4, 4, 4, 127, 0, _by_sdot),
    "plain": Instructions(4, 1, 16, 127, 128, _one_by_one),
}
"""By the processor's name of the feature; ``plain`` needs none. Each is there for fine entries too."""
INSTRUCTIONS.update({name + FINE_SUFFIX: replace(kind, is_fine=True) for name, kind in INSTRUCTIONS.items()})


def is_matrix(name: str) -> bool:
    """True if sums are whole matrices (AMX), for which there have to be 16 rows."""
    return INSTRUCTIONS[name].add_products is None


def without_instructions(kind: Instructions) -> Instructions:
    """The same sums on a processor that lacks the instructions, for tests."""
    return replace(kind, add_products=functools.partial(_one_by_one, signed=kind.zero == 0))


class _Tile:
    """Writes the loops for one tile: R rows with 64 keys, or the first of them."""

    def __init__(
        self, kind: Instructions, builder: Any, row_at: list[Any], keys_at: Any, columns: Any, count: int
    ) -> None:
        self._kind, self._builder, self._row_at, self._keys_at, self._columns = kind, builder, row_at, keys_at, columns
        self._count = count
        self._size, self._sums = columns.type, ir.VectorType(_INT, kind.lanes)

    def _number(self, value: int) -> Any:
        return ir.Constant(self._size, value)

    def _pointer(self, base: Any, offset: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(base, [offset], inbounds=True), kind.as_pointer())

    def sum_up(self, start_at: Any, out_at: Any, out_stride: Any) -> None:
        """Write ``start`` plus all products: a sum of 32 bits for each row and key, rows a number of bytes apart."""
        kind, builder = self._kind, self._builder
        nothing, half = self._number(0), builder.lshr(self._columns, self._number(1))
        vectors = self._count // kind.lanes
        for first in range(0, vectors, kind.vectors):
            lanes = [v * kind.lanes for v in range(first, min(first + kind.vectors, vectors))]
            held = [[cgutils.alloca_once(builder, self._sums) for _ in lanes] for _ in self._row_at]
            outs = []
            for number in range(len(held)):
                row = cgutils.pointer_add(builder, out_at, builder.mul(out_stride, self._number(number)))
                outs.append([self._pointer(row, self._number(lane), self._sums) for lane in lanes])
            starts = [self._pointer(start_at, self._number(lane), self._sums) for lane in lanes]
            self._begin(starts, lanes, held, half)
            if kind.is_fine:
                self._add_all(nothing, half, half, lanes, held)
                self._add_all(half, nothing, half, lanes, held)
            else:
                self._add_all(nothing, nothing, self._columns, lanes, held)
            for total, at in ((total, at) for totals, row in zip(held, outs) for total, at in zip(totals, row)):
                builder.store(builder.load(total), at, align=4)

    def _begin(self, starts: list[Any], lanes: list[int], held: list[list[Any]], half: Any) -> None:
        """Hold ``start``, and of fine entries 64 times the products of first parts."""
        builder, nothing = self._builder, self._number(0)
        if self._kind.is_fine:
            self._clear(held)
            self._add_all(nothing, nothing, half, lanes, held)
        for totals in held:
            for at, total in zip(starts, totals):
                start = builder.load(at, align=4)
                if self._kind.is_fine:
                    start = builder.add(start, builder.shl(builder.load(total), _constant(start, FINE_BITS)))
                builder.store(start, total)

    def _clear(self, held: list[list[Any]]) -> None:
        for total in (total for totals in held for total in totals):
            self._builder.store(ir.Constant(self._sums, [0] * self._kind.lanes), total)

    def _add_all(self, row_first: Any, key_first: Any, count: Any, lanes: list[int], held: list[list[Any]]) -> None:
        """Add the products of so many columns, which begin there, to what is held."""
        builder, halves = self._builder, (0, COLUMN_STEP // 2)
        with cgutils.for_range_slice(builder, self._number(0), count, self._number(COLUMN_STEP)) as (at, _):
            keys = []
            for lane in lanes:
                group = builder.mul(self._columns, self._number(lane // LANES * LANES))
                base = builder.add(group, self._number(lane % LANES * 4))
                both = []
                for half in halves:
                    column = builder.add(builder.add(key_first, at), self._number(half))
                    place = builder.add(base, builder.mul(column, self._number(LANES)))
                    both.append(builder.load(self._pointer(self._keys_at, place, self._sums), align=4))
                keys.append(both)
            for row_at, totals in zip(self._row_at, held):
                row = []
                for half in halves:
                    column = builder.add(builder.add(row_first, at), self._number(half))
                    row.append(self._everywhere(builder.load(self._pointer(row_at, column, _INT), align=1)))
                for both, total in zip(keys, totals):
                    builder.store(self._kind.add_products(builder, builder.load(total), row, both), total)

    def _everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(self._sums, ir.Undefined)
        first = self._builder.insert_element(nothing, value, ir.Constant(_INT, 0))
        mask = ir.Constant(ir.VectorType(_INT, self._kind.lanes), [0] * self._kind.lanes)
        return self._builder.shuffle_vector(first, nothing, mask)


class _MatrixTile:
    """Writes the loops for one tile in AMX's instructions, whose registers are matrices of 16 x 64 bytes.

    Four of them hold the sums of 32 rows with 32 keys; a row of the keys' matrix is four columns of 16 keys, as they
    are interleaved.
    """

    SIDE = 16
    STEP = 64  # columns of a matrix of rows

    def __init__(
        self, kind: Instructions, builder: Any, row_at: list[Any], stride: Any, keys_at: Any, columns: Any, count: int
    ) -> None:
        self._kind, self._builder, self._row_at, self._row_stride = kind, builder, row_at[:: self.SIDE], stride
        self._keys_at, self._columns, self._size, self._count = keys_at, columns, columns.type, count

    def _number(self, value: int) -> Any:
        return ir.Constant(self._size, value)

    def _tile(self, name: str, *given: Any) -> None:
        given = tuple(ir.Constant(_BYTE, x) if isinstance(x, int) else x for x in given)
        _call(self._builder, f"llvm.x86.{name}", ir.VoidType(), *given)

    def _at(self, base: Any, offset: Any) -> Any:
        return self._builder.gep(self._builder.bitcast(base, _BYTE.as_pointer()), [offset], inbounds=True)

    def sum_up(self, _: Any, out_at: Any, out_stride: Any) -> None:
        """Write all products: a sum of 32 bits for each row and key, rows a number of bytes apart.

        They begin with zero: nothing is added to entries that are multiplied with their signs.
        """
        builder, is_fine, nothing = self._builder, self._kind.is_fine, self._number(0)
        middle = builder.lshr(self._columns, self._number(1))
        parts = range(len(self._row_at))
        for half in range(0, self._count // LANES, 2):
            outs = []
            for part in parts:
                row = cgutils.pointer_add(builder, out_at, builder.mul(out_stride, self._number(part * self.SIDE)))
                outs += [self._at(row, self._number(4 * LANES * (half + side))) for side in range(2)]
            self._clear(outs)
            if is_fine:
                self._add(half, nothing, nothing, middle)
                for number, out in enumerate(outs):
                    self._tile("tilestored64", number, out, out_stride)
                    for at in self._rows(out, out_stride):
                        held = builder.load(at, align=4)
                        builder.store(builder.shl(held, _constant(held, FINE_BITS)), at, align=4)
                    self._tile("tileloadd64", number, out, out_stride)
                self._add(half, nothing, middle, middle)
                self._add(half, middle, nothing, middle)
            else:
                self._add(half, nothing, nothing, self._columns)
            for number, out in enumerate(outs):
                self._tile("tilestored64", number, out, out_stride)

    def _clear(self, outs: list[Any]) -> None:
        for number in range(len(outs)):
            self._tile("tilezero", number)

    def _rows(self, base: Any, stride: Any) -> list[Any]:
        """Pointers to the 16 rows of a matrix in memory."""
        sums, builder = ir.VectorType(_INT, self.SIDE).as_pointer(), self._builder
        offsets = [builder.mul(stride, self._number(number)) for number in range(self.SIDE)]
        return [builder.bitcast(self._at(base, offset), sums) for offset in offsets]

    def _add(self, half: int, row_first: Any, key_first: Any, count: Any) -> None:
        """Add the products of so many columns, which begin there, of all rows with 32 keys."""
        builder = self._builder
        with cgutils.for_range_slice(builder, self._number(0), count, self._number(self.STEP)) as (at, _):
            for side in range(2):
                lanes = self._number(LANES * (half + side))
                column = builder.mul(builder.add(key_first, at), self._number(LANES))
                offset = builder.add(builder.mul(self._columns, lanes), column)
                self._tile("tileloadd64", 6 + side, self._at(self._keys_at, offset), self._number(4 * LANES))
            for part, row_at in enumerate(self._row_at):
                row = self._at(row_at, builder.add(row_first, at))
                self._tile("tileloadd64", 4 + part, row, self._row_stride)
                for side in range(2):
                    self._tile("tdpbssd", 2 * part + side, 4 + part, 6 + side)


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
                shape = [1, *[0] * 15, *[_MatrixTile.STEP, 0] * 8, *[0] * 16, *[_MatrixTile.SIDE] * 8, *[0] * 8]
                kind = ir.ArrayType(_BYTE, len(shape))
                held = cgutils.alloca_once_value(builder, ir.Constant(kind, [ir.Constant(_BYTE, x) for x in shape]))
                _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(held, _BYTE.as_pointer()))
            return context.get_dummy_value()

        return types.void(), generate

    def after(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            if has_shape:
                _call(builder, "llvm.x86.tilerelease", ir.VoidType())
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
    kind = INSTRUCTIONS[name]

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
            tile: _Tile | _MatrixTile = _Tile(kind, builder, row_at, keys_at, given[4], keys)
            if kind.add_products is None:
                tile = _MatrixTile(kind, builder, row_at, stride, keys_at, given[4], keys)
            tile.sum_up(start_at, made[7].data, builder.extract_value(made[7].strides, 0))
            return context.get_dummy_value()

        size = types.intp
        return types.void(row_QE, size, key_B, size, size, start_M, size, out_RX), generate

    return numba.extending.intrinsic(typed)

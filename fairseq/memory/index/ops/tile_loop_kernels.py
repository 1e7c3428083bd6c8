"""The loops of a tile of products: a few rows of 8-bit integers with 64 keys, in each processor's instructions.

Compilers do not find these instructions in a loop. Hence the loop is written down in the compiler's own language, once,
with one small part for each instruction set (``INSTRUCTIONS``). All sum the same integers, so that the result is the
same to the last bit.

Layout: a row's entries have ``zero`` added, so that they are unsigned where the instruction wants that. Keys are signed
and *interleaved*: in groups of 16 keys, of each four columns at a time, so that one load has four columns of 16 keys.

*Fine* entries take two bytes. Where processors multiply numbers of 16 bits fast, they are such *wide* numbers, small
enough for sums of 32 bits: in each group two columns at a time. Otherwise they have two *parts*: 64 times a first one,
plus a second of -64 to 62. The first half of the columns are first parts, the second half second ones. Sums are a 64th
of the product, but for that of second parts with each other, which is left out (``bounded_scores`` has its bound).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils

LANES = 16
"""Keys that are interleaved."""
TILE_KEYS = 64
COLUMN_STEP = 8
"""Columns are multiplied by so many at a time."""
MATRIX_SIDE, MATRIX_STEP = 16, 64
"""Rows, and columns, of a matrix in AMX's registers."""
FINE_BITS = 6
FINE = 1 << FINE_BITS
"""First parts of fine entries count so many times as much as second ones."""
FINE_SUFFIX = "_fine"
LONGEST_WORDS = 45_000.0
"""Length of a vector of wide entries: the square of a little more, which any part of a sum may reach, is below 2^31."""
_LARGEST_WORD = 32_700
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
    """(builder, sums, row, keys) -> sums; row and keys are two vectors of four columns for each lane, or, in pairs, one
    of eight columns for each of two. None where sums are whole matrices (``_MatrixTile``)."""
    column_step: int = COLUMN_STEP
    """Columns are a multiple of it."""
    is_fine: bool = False
    """Entries take two bytes."""
    is_wide: bool = False
    """Entries are numbers of 16 bits; of those that are fine."""
    cost: float = 1.0
    """Time of a product, in those of entries of 8 bits."""
    in_pairs: bool = False
    """A vector has the sums of two rows with two keys (``_PairTile``)."""

    @property
    def has_parts(self) -> bool:
        """Entries have two parts."""
        return self.is_fine and not self.is_wide


def call_intrinsic(builder: Any, name: str, result: Any, *given: Any) -> Any:
    """Write the call of one of LLVM's functions."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [x.type for x in given]), name)
    return builder.call(function, given)


def _constant(like: Any, value: int) -> Any:
    return ir.Constant(like.type, [value] * like.type.count)


def _by_four(name: str) -> Callable[[Any, Any, list[Any], list[Any]], Any]:
    """One instruction that adds four products to each lane; ``name`` takes lanes of 32 bits."""

    def add(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
        for a, b in zip(row, keys):
            sums = call_intrinsic(builder, name, sums.type, sums, a, b)
        return sums

    return add


def _let_use(builder: Any, features: str) -> None:
    """Let a function have instructions of ARM that LLVM does not list among a processor's own."""
    set.add(builder.function.attributes, f'"target-features"="+neon,+fp-armv8,{features}"')


def _by_smmla(builder: Any, sums: Any, row: Any, keys: Any) -> Any:
    _let_use(builder, "+i8mm")
    as_bytes = ir.VectorType(_BYTE, 16)
    given = (sums, builder.bitcast(row, as_bytes), builder.bitcast(keys, as_bytes))
    return call_intrinsic(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", sums.type, *given)


def _by_sdot(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    _let_use(builder, "+dotprod")
    as_bytes = ir.VectorType(_BYTE, 16)
    for a, b in zip(row, keys):
        given = (sums, builder.bitcast(a, as_bytes), builder.bitcast(b, as_bytes))
        sums = call_intrinsic(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums.type, *given)
    return sums


def _by_pairs(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    """Pairs of products in 16 bits, which have room for two pairs of products of 7-bit numbers (2 * 2 * 127 * 63)."""
    as_bytes, as_words = ir.VectorType(_BYTE, 32), ir.VectorType(_WORD, 16)
    pairs = [
        call_intrinsic(
            builder, "llvm.x86.avx2.pmadd.ub.sw", as_words, builder.bitcast(a, as_bytes), builder.bitcast(b, as_bytes)
        )
        for a, b in zip(row, keys)
    ]
    both = builder.add(*pairs)
    return builder.add(sums, call_intrinsic(builder, "llvm.x86.avx2.pmadd.wd", sums.type, both, _constant(both, 1)))


def _by_words(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    as_words = ir.VectorType(_WORD, 2 * sums.type.count)
    for a, b in zip(row, keys):
        given = (builder.bitcast(a, as_words), builder.bitcast(b, as_words))
        sums = builder.add(sums, call_intrinsic(builder, "llvm.x86.avx2.pmadd.wd", sums.type, *given))
    return sums


def _word_by_word(builder: Any, sums: Any, row: list[Any], keys: list[Any]) -> Any:
    for a, b in zip(row, keys):
        for left in (16, 0):
            word, key = (builder.ashr(builder.shl(x, _constant(x, left)), _constant(x, 16)) for x in (a, b))
            sums = builder.add(sums, builder.mul(word, key))
    return sums


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
    "i8mm": Instructions(8, 2, 4, 127, 0, _by_smmla, in_pairs=True),
    "asimddp": Instructions(4, 4, 4, 127, 0, _by_sdot),
    "plain": Instructions(4, 1, 16, 127, 128, _one_by_one),
}
"""By the processor's name of the feature; ``plain`` needs none. Each is there for fine entries too."""
_WORDS = {
    "avx512_vnni": (2.0, _by_four("llvm.x86.avx512.vpdpwssd.512")),
    "avx_vnni": (2.0, _by_four("llvm.x86.avx512.vpdpwssd.256")),
    "avx2": (1.5, _by_words),
}
for _name, _kind in list(INSTRUCTIONS.items()):
    _fine = replace(_kind, is_fine=True, cost=3.0)
    if _name in _WORDS:
        _cost, _add = _WORDS[_name]
        _fine = replace(_fine, is_wide=True, cost=_cost, add_products=_add, levels=_LARGEST_WORD, zero=0)
    INSTRUCTIONS[_name + FINE_SUFFIX] = _fine


def is_matrix(name: str) -> bool:
    """True if sums are whole matrices (AMX), for which there have to be 16 rows."""
    return INSTRUCTIONS[name].add_products is None


def without_instructions(kind: Instructions) -> Instructions:
    """The same sums on a processor that lacks the instructions, for tests."""
    add = _word_by_word if kind.is_wide else functools.partial(_one_by_one, signed=kind.zero == 0)
    return replace(kind, add_products=add, in_pairs=False)


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
            if kind.has_parts:
                self._add_all(nothing, half, half, lanes, held)
                self._add_all(half, nothing, half, lanes, held)
            else:
                self._add_all(nothing, nothing, self._columns, lanes, held)
            for total, at in ((total, at) for totals, row in zip(held, outs) for total, at in zip(totals, row)):
                builder.store(builder.load(total), at, align=4)

    def _begin(self, starts: list[Any], lanes: list[int], held: list[list[Any]], half: Any) -> None:
        """Hold ``start``, and of entries in two parts 64 times the products of first ones."""
        builder, nothing = self._builder, self._number(0)
        if self._kind.has_parts:
            self._clear(held)
            self._add_all(nothing, nothing, half, lanes, held)
        for totals in held:
            for at, total in zip(starts, totals):
                start = builder.load(at, align=4)
                if self._kind.has_parts:
                    start = builder.add(start, builder.shl(builder.load(total), _constant(start, FINE_BITS)))
                builder.store(start, total)

    def _clear(self, held: list[list[Any]]) -> None:
        for total in (total for totals in held for total in totals):
            self._builder.store(ir.Constant(self._sums, [0] * self._kind.lanes), total)

    def _add_all(self, row_first: Any, key_first: Any, count: Any, lanes: list[int], held: list[list[Any]]) -> None:
        """Add the products of so many columns, which begin there, to what is held."""
        builder, halves = self._builder, (0, COLUMN_STEP // 2)
        with cgutils.for_range_slice(builder, self._number(0), count, self._number(COLUMN_STEP)) as (at, _):
            keys = [self._load_keys(lane, builder.add(key_first, at)) for lane in lanes]
            for row_at, totals in zip(self._row_at, held):
                row = []
                for half in halves:
                    column = builder.add(builder.add(row_first, at), self._number(half))
                    row.append(self._everywhere(builder.load(self._pointer(row_at, column, _INT), align=1)))
                for both, total in zip(keys, totals):
                    builder.store(self._kind.add_products(builder, builder.load(total), row, both), total)

    def _load_keys(self, lane: int, first: Any) -> list[Any]:
        """Two times four columns, from the first on, of the keys of a vector."""
        builder, both = self._builder, []
        group = builder.mul(self._columns, self._number(lane // LANES * LANES))
        base = builder.add(group, self._number(lane % LANES * 4))
        for half in (0, COLUMN_STEP // 2):
            column = builder.add(first, self._number(half))
            place = builder.add(base, builder.mul(column, self._number(LANES)))
            both.append(builder.load(self._pointer(self._keys_at, place, self._sums), align=4))
        return both

    def _everywhere(self, value: Any) -> Any:
        nothing = ir.Constant(self._sums, ir.Undefined)
        first = self._builder.insert_element(nothing, value, ir.Constant(_INT, 0))
        mask = ir.Constant(ir.VectorType(_INT, self._kind.lanes), [0] * self._kind.lanes)
        return self._builder.shuffle_vector(first, nothing, mask)


class _PairTile(_Tile):
    """Writes the loops for one tile in ARM's products of two rows with two keys, eight columns at a time (i8mm).

    A vector has two sums of the first row, and two of the second.
    """

    def sum_up(self, _: Any, out_at: Any, out_stride: Any) -> None:
        """Write all products: a sum of 32 bits for each row and key, rows a number of bytes apart.

        They begin with zero: nothing is added to entries that are multiplied with their signs.
        """
        kind, builder = self._kind, self._builder
        nothing, half = self._number(0), builder.lshr(self._columns, self._number(1))
        lines = range(0, len(self._row_at), 2)
        for first in range(0, self._count // kind.lanes, kind.vectors):
            lanes = [v * kind.lanes for v in range(first, first + kind.vectors)]
            held = [[cgutils.alloca_once(builder, self._sums) for _ in range(2 * len(lanes))] for _ in lines]
            self._clear(held)
            if kind.has_parts:
                self._add_all(nothing, nothing, half, lanes, held)
                for total in (total for totals in held for total in totals):
                    sums = builder.load(total)
                    builder.store(builder.shl(sums, _constant(sums, FINE_BITS)), total)
                self._add_all(nothing, half, half, lanes, held)
                self._add_all(half, nothing, half, lanes, held)
            else:
                self._add_all(nothing, nothing, self._columns, lanes, held)
            for line, totals in zip(lines, held):
                for number, lane in enumerate(lanes):
                    sums = [builder.load(total) for total in totals[2 * number : 2 * number + 2]]
                    for row in range(line, min(line + 2, len(self._row_at))):
                        base = cgutils.pointer_add(builder, out_at, builder.mul(out_stride, self._number(row)))
                        own = self._shuffled(sums, (0, 1, 4, 5) if row == line else (2, 3, 6, 7))
                        builder.store(own, self._pointer(base, self._number(lane), self._sums), align=4)

    def _add_all(self, row_first: Any, key_first: Any, count: Any, lanes: list[int], held: list[list[Any]]) -> None:
        builder, step = self._builder, self._number(COLUMN_STEP)
        with cgutils.for_range_slice(builder, self._number(0), count, step) as (at, _):
            keys = []
            for lane in lanes:
                fours = self._load_keys(lane, builder.add(key_first, at))
                keys += [self._shuffled(fours, (0, 4, 1, 5)), self._shuffled(fours, (2, 6, 3, 7))]
            place = builder.add(row_first, at)
            for line, totals in enumerate(held):
                rows = self._load_rows(self._row_at[2 * line : 2 * line + 2], place)
                for pair, total in zip(keys, totals):
                    builder.store(self._kind.add_products(builder, builder.load(total), rows, pair), total)

    def _load_rows(self, row_at: list[Any], place: Any) -> Any:
        """Eight columns of two rows; of the last of an odd number twice."""
        eight, pair = ir.IntType(64), ir.VectorType(ir.IntType(64), 2)
        rows = ir.Constant(pair, ir.Undefined)
        for number, base in enumerate([row_at[0], row_at[-1]]):
            part = self._builder.load(self._pointer(base, place, eight), align=1)
            rows = self._builder.insert_element(rows, part, ir.Constant(_INT, number))
        return rows

    def _shuffled(self, both: list[Any], places: tuple[int, ...]) -> Any:
        return self._builder.shuffle_vector(*both, ir.Constant(ir.VectorType(_INT, len(places)), list(places)))


class _MatrixTile:
    """Writes the loops for one tile in AMX's instructions, whose registers are matrices of 16 x 64 bytes.

    Four of them hold the sums of 32 rows with 32 keys; a row of the keys' matrix is four columns of 16 keys, as they
    are interleaved.
    """

    def __init__(
        self, kind: Instructions, builder: Any, row_at: list[Any], stride: Any, keys_at: Any, columns: Any, count: int
    ) -> None:
        self._kind, self._builder, self._row_at, self._row_stride = kind, builder, row_at[::MATRIX_SIDE], stride
        self._keys_at, self._columns, self._size, self._count = keys_at, columns, columns.type, count

    def _number(self, value: int) -> Any:
        return ir.Constant(self._size, value)

    def _tile(self, name: str, *given: Any) -> None:
        given = tuple(ir.Constant(_BYTE, x) if isinstance(x, int) else x for x in given)
        call_intrinsic(self._builder, f"llvm.x86.{name}", ir.VoidType(), *given)

    def _at(self, base: Any, offset: Any) -> Any:
        return self._builder.gep(self._builder.bitcast(base, _BYTE.as_pointer()), [offset], inbounds=True)

    def sum_up(self, _: Any, out_at: Any, out_stride: Any) -> None:
        """Write all products: a sum of 32 bits for each row and key, rows a number of bytes apart.

        They begin with zero: nothing is added to entries that are multiplied with their signs.
        """
        builder, has_parts, nothing = self._builder, self._kind.has_parts, self._number(0)
        middle = builder.lshr(self._columns, self._number(1))
        parts = range(len(self._row_at))
        for half in range(0, self._count // LANES, 2):
            outs = []
            for part in parts:
                row = cgutils.pointer_add(builder, out_at, builder.mul(out_stride, self._number(part * MATRIX_SIDE)))
                outs += [self._at(row, self._number(4 * LANES * (half + side))) for side in range(2)]
            self._clear(outs)
            if has_parts:
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
        sums, builder = ir.VectorType(_INT, MATRIX_SIDE).as_pointer(), self._builder
        offsets = [builder.mul(stride, self._number(number)) for number in range(MATRIX_SIDE)]
        return [builder.bitcast(self._at(base, offset), sums) for offset in offsets]

    def _add(self, half: int, row_first: Any, key_first: Any, count: Any) -> None:
        """Add the products of so many columns, which begin there, of all rows with 32 keys."""
        builder = self._builder
        with cgutils.for_range_slice(builder, self._number(0), count, self._number(MATRIX_STEP)) as (at, _):
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


def write_tile(
    name: str, builder: Any, row_at: list[Any], row_stride: Any, keys_at: Any, columns: Any, count: int
) -> _Tile | _MatrixTile:
    """The writer of an instruction set's loops for some rows, as many bytes apart, and so many keys."""
    kind = INSTRUCTIONS[name]
    if kind.add_products is None:
        return _MatrixTile(kind, builder, row_at, row_stride, keys_at, columns, count)
    return (_PairTile if kind.in_pairs else _Tile)(kind, builder, row_at, keys_at, columns, count)

"""Products of float32 by AMX's matrices of bfloat16, as exact as float32's own.

A float32 is the sum of three bfloat16, which have its mantissa's bits eight by eight. Of the nine products of their
parts the three least are left out, about 2^-24 of the product. The others are summed in float32, 32 columns at a time:
errors were 0.45 of those of a loop over 768 columns in float32.

Layout: a *chunk* is 32 columns. Types are split when they are multiplied, 32 at a time, as they lie in their matrix: a
register has 16 types with the pairs of columns (i, 16 + i). States are split once, and each part is transposed: a
register has 16 such pairs of columns of 16 states.

Shapes: D width, X numbers of 32 bits of a scratch memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, numba, types
from fairseq.memory.index.ops.vector_kernels import fetch_line

SIDE = 16
"""Rows of a register, and numbers of 32 bits of its row."""
TILE = SIDE * SIDE
"""Numbers of 32 bits of a register."""
CHUNK = 2 * SIDE
"""Columns of a register."""
BLOCK = 2 * SIDE
"""Types, or states, that are multiplied at a time."""
NUM_PARTS = 3
PARTS = NUM_PARTS * 2 * TILE
"""Numbers of 32 bits of a block's parts of a chunk: two registers of each part, the largest part first."""
_AHEAD = 8  # chunks; of 4, 8 and 16 the fastest by a little

# Parts of types and of states. States come from the second level of the cache, and in this order six times for a chunk;
# in one in which they come eight times, a matrix of 768 x 50,257 takes 10.2 instead of 8.6 ms.
_PAIRS = ((0, 2), (0, 0), (2, 0), (1, 0), (1, 1), (0, 1))
_BYTE, _INT, _SIZE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_INT, SIDE), ir.VectorType(ir.FloatType(), SIDE)


def _everywhere(value: int) -> Any:
    return ir.Constant(_INTS, [value] * SIDE)


def _number(value: int) -> Any:
    return ir.Constant(_SIZE, value)


def _at(builder: Any, base: Any, offset: Any, kind: Any = _INTS) -> Any:
    """Pointer to a vector so many elements after the base."""
    return builder.bitcast(builder.gep(base, [offset], inbounds=True), kind.as_pointer())


def _split(builder: Any, row_at: Any, part_at: Any, part_step: int) -> None:
    """Write the three parts of 32 columns, ``part_step`` numbers of 32 bits apart."""
    upper, shift = _everywhere(0xFFFF0000), _everywhere(SIDE)
    left = [builder.load(_at(builder, row_at, _number(half * SIDE)), align=4) for half in range(2)]
    for part in range(NUM_PARTS):
        first, second = (builder.and_(bits, upper) for bits in left)
        pair = builder.or_(builder.lshr(left[0], shift), second)
        builder.store(pair, _at(builder, part_at, _number(part * part_step)), align=4)
        if part + 1 < NUM_PARTS:
            left = [
                builder.bitcast(builder.fsub(builder.bitcast(bits, _FLOATS), builder.bitcast(above, _FLOATS)), _INTS)
                for bits, above in zip(left, (first, second))
            ]


def _split_columns(typing_context: Any, row_X: Any, place: Any, part_X: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        row, part = (context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 2))
        row_at, part_at = builder.gep(row, [given[1]], inbounds=True), builder.gep(part, [given[3]], inbounds=True)
        _split(builder, row_at, part_at, TILE)
        return context.get_dummy_value()

    return types.void(row_X, types.intp, part_X, types.intp), generate


split_columns: Any = numba.extending.intrinsic(_split_columns)
"""``(row_X, place, part_X, to)``: write the parts of a chunk of a row, which begins at a place, a register apart."""


def _transpose(typing_context: Any, from_X: Any, place: Any, to_X: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, target = (context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 2))
        source, target = (builder.bitcast(base, _INT.as_pointer()) for base in (source, target))
        places = [_number(number * SIDE) for number in range(SIDE)]
        rows = [builder.load(_at(builder, source, builder.add(given[1], place)), align=4) for place in places]
        low = [place for i in range(SIDE // 2) for place in (i, SIDE + i)]
        masks = [ir.Constant(_INTS, [first + i for i in low]) for first in (0, SIDE // 2)]
        for _ in range(SIDE.bit_length() - 1):  # each step interleaves the first half with the second
            pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :])
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for row, place in zip(rows, places):
            builder.store(row, _at(builder, target, builder.add(given[3], place)), align=4)
        return context.get_dummy_value()

    return types.void(from_X, types.intp, to_X, types.intp), generate


transpose: Any = numba.extending.intrinsic(_transpose)
"""``(from_X, place, to_X, to)``: write 16 x 16 numbers of 32 bits with rows and columns exchanged."""


class _Block:
    """Writes the loop over the chunks for 32 types and 16 or 32 states.

    Registers 0 to 3 hold sums, 4 and 5 types, 6 and 7 states.
    """

    def __init__(self, builder: Any, state_tiles: int, stride: Any) -> None:
        self._builder, self._state_tiles, self._stride = builder, state_tiles, stride

    def _tile(self, name: str, *given: Any) -> None:
        given = tuple(ir.Constant(_BYTE, x) if isinstance(x, int) else x for x in given)
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in given])
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.x86.{name}")
        self._builder.call(function, given)

    def _move(self, name: str, register: int, base: Any, place: int) -> None:
        at = self._builder.gep(base, [_number(place)], inbounds=True)
        self._tile(name, register, self._builder.bitcast(at, _BYTE.as_pointer()), _number(4 * SIDE))

    def multiply(self, weight_at: Any, chunks: Any, part_at: Any, room_at: Any, ahead: Any) -> None:
        """Write the sums to the room, a register of each 16 types and each 16 states.

        Meanwhile split the next chunk of types into that half of the room which is free, and fetch later ones; after
        the last one, those of the block that is ``ahead`` by so many numbers.
        """
        builder = self._builder
        self._split_rows(weight_at, room_at, range(BLOCK))
        for register in range(4):
            self._tile("tilezero", register)
        with cgutils.for_range_slice(builder, _number(0), chunks, _number(1)) as (chunk, _):
            present = builder.mul(builder.and_(chunk, _number(1)), _number(PARTS))
            following = builder.sub(_number(PARTS), present)
            after = builder.add(chunk, _number(1))
            is_last = builder.icmp_unsigned("==", after, chunks)  # splits the first one again
            column = builder.mul(builder.select(is_last, _number(0), after), _number(CHUNK))
            fetched = builder.add(chunk, _number(_AHEAD))
            is_beyond = builder.icmp_unsigned(">=", fetched, chunks)
            over = builder.add(builder.mul(builder.sub(fetched, chunks), _number(CHUNK)), ahead)
            fetched = builder.select(is_beyond, over, builder.mul(fetched, _number(CHUNK)))
            places = (present, builder.mul(chunk, _number(PARTS)), following, column)
            type_at, state_at, next_at, next_weight_at = (
                builder.gep(base, [place], inbounds=True)
                for base, place in zip((room_at, part_at, room_at, weight_at), places)
            )
            self._add_chunk(type_at, state_at, next_at, next_weight_at, builder.sub(fetched, column))
        for types_ in range(2):
            for states in range(self._state_tiles):
                number = 2 * types_ + states
                self._move("tilestored64", number, room_at, number * TILE)

    def _add_chunk(self, type_at: Any, state_at: Any, next_at: Any, weight_at: Any, ahead: Any) -> None:
        products = self._products()
        count = len(products)
        held: dict[int, int] = {}
        for number, (sums, wanted) in enumerate(products):
            for register, (is_state, place) in wanted.items():
                if held.get(register) != place:
                    self._move("tileloadd64", register, state_at if is_state else type_at, place)
                    held[register] = place
            self._tile("tdpbf16ps", sums, *wanted)
            first, last = (BLOCK * n // count for n in (number, number + 1))
            weight_at = self._split_rows(weight_at, next_at, range(first, last), ahead)

    def _products(self) -> list[tuple[int, dict[int, tuple[bool, int]]]]:
        """Register of the sums, and the places of the types and states that are to be in two others."""
        found, before = [], None
        for type_part, state_part in _PAIRS:
            order = [(t, s) for t in range(2) for s in range(self._state_tiles)]
            if type_part == before:  # the first register of states is loaded before the second
                order.sort(key=lambda pair: pair[1])
            before = type_part
            for t, s in order:
                places = {4 + t: (False, (2 * type_part + t) * TILE), 6 + s: (True, (2 * state_part + s) * TILE)}
                found.append((2 * t + s, places))
        return found

    def _split_rows(self, row_at: Any, part_at: Any, rows: range, ahead: Any = None) -> Any:
        """Split a chunk of some rows and fetch what is so many numbers ahead; returns where the next row begins."""
        for row in rows:
            tile, line = divmod(row, SIDE)
            at = self._builder.gep(part_at, [_number(tile * TILE + line * SIDE)], inbounds=True)
            _split(self._builder, row_at, at, 2 * TILE)
            for half in range(0 if ahead is None else 2):
                place = self._builder.add(ahead, _number(half * SIDE))
                fetch_line(self._builder, self._builder.gep(row_at, [place]), level=2)
            row_at = self._builder.gep(row_at, [self._stride])
        return row_at


def _block(state_tiles: int) -> Any:
    """The intrinsic ``(weight_X, place, D, part_X, from, room_X, ahead)`` for blocks of so many registers of states.

    It writes the products of 32 types, which begin at ``weight_X[place]``, with the states whose parts begin at
    ``part_X[from]``, to the room, and fetches the first of 32 types that begin ``ahead`` numbers after them.
    """

    def typed(typing_context: Any, weight_X: Any, place: Any, width: Any, part_X: Any, start: Any, room_X: Any,
              ahead: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            weight, part, room = (
                context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 3, 5)
            )
            weight_at, part_at = (builder.gep(base, [given[i]], inbounds=True) for base, i in ((weight, 1), (part, 4)))
            chunks = builder.udiv(given[2], _number(CHUNK))
            _Block(builder, state_tiles, given[2]).multiply(weight_at, chunks, part_at, room, given[6])
            return context.get_dummy_value()

        size = types.intp
        return types.void(weight_X, size, size, part_X, size, room_X, size), generate

    return numba.extending.intrinsic(typed)


multiply_16, multiply_32 = map(_block, (1, 2))
"""See :func:`_block`; for 16 states, and for 32."""

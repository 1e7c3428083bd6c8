"""Sums over the columns of two rows, each in one order whatever it is computed beside and by.

Left to the compiler, which may take sums in any order to use vectors, the same two rows had other last bits in every
loop. Here the order is written down, in the compiler's own instructions: 16 columns at a time, one to each of 16 lanes;
these are added by halves to 8, which take 8 more columns if there are; these by halves to one, which takes the rest one
after the other. Nothing is fused, so that all CPUs have the same bits.

Shapes: D width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.half_kernels import KINDS, loaded_type, widened
from fairseq.memory.index.ops.numba_library import cgutils, errors, numba, types

_WHOLE, _HALF = 16, 8
_alloca: Any = cgutils.alloca_once
_tuple_of: Any = types.UniTuple
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


def _rows_of(context: Any, builder: Any, signature: Any, given: Any) -> tuple[Any, list[Any]]:
    """The width, and pointers to the query and the keys."""
    query_type, keys_type = signature.args
    arrays = [(query_type, given[0])]
    arrays += [(keys_type.dtype, builder.extract_value(given[1], i)) for i in range(keys_type.count)]
    made = [context.make_array(kind)(context, builder, value) for kind, value in arrays]
    return builder.extract_value(made[0].shape, 0), [array.data for array in made]


def _step(builder: Any, rows: list[Any], kind: Any, sums: list[Any], at: Any, lanes: int, *, squared: bool) -> None:
    """Add the terms of so many columns to the sum of each key; keys are of this kind."""
    loaded = []
    for row, each in zip(rows, [types.float32] + [kind] * (len(rows) - 1)):
        place = builder.bitcast(builder.gep(row, [at], inbounds=True), loaded_type(each, lanes).as_pointer())
        loaded.append(widened(builder, builder.load(place, align=each.bitwidth // 8), each))
    for key, total in zip(loaded[1:], sums):
        one = builder.fsub(loaded[0], key) if squared else loaded[0]
        term = builder.fmul(one, one if squared else key)
        builder.store(builder.fadd(builder.load(total), term), total)


def _folded(builder: Any, vector: Any, lanes: int) -> Any:
    """Halves of a vector, added until so many lanes are left."""
    while vector.type.count > lanes:
        half, parts = vector.type.count // 2, []
        for first in (0, half):
            mask = ir.Constant(ir.VectorType(_INT, half), list(range(first, first + half)))
            parts.append(builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask))
        vector = builder.fadd(*parts)
    return vector if lanes > 1 else builder.extract_element(vector, ir.Constant(_INT, 0))


def _generate(context: Any, builder: Any, signature: Any, given: Any, *, squared: bool) -> Any:
    width, rows = _rows_of(context, builder, signature, given)
    size, kind = width.type, ir.VectorType(_FLOAT, _WHOLE)
    edges = [ir.Constant(size, 0), *(builder.and_(width, ir.Constant(size, -n)) for n in (_WHOLE, _HALF)), width]
    held: list[Any] = [ir.Constant(kind, [0.0] * _WHOLE)] * (len(rows) - 1)
    for lanes, first, past in zip((_WHOLE, _HALF, 1), edges, edges[1:]):
        starts = [_folded(builder, vector, lanes) for vector in held]
        sums = [_alloca(builder, start.type) for start in starts]
        for start, total in zip(starts, sums):
            builder.store(start, total)
        with cgutils.for_range_slice(builder, first, past, ir.Constant(size, lanes)) as (at, _):
            _step(builder, rows, signature.args[1].dtype.dtype, sums, at, lanes, squared=squared)
        held = [builder.load(total) for total in sums]
    return context.make_tuple(builder, signature.return_type, held)


def _signature(query_D: Any, keys: Any) -> Any:
    row = isinstance(keys, types.UniTuple) and keys.dtype
    for each, kinds in ((query_D, KINDS[:1]), (row, KINDS)):
        if not isinstance(each, types.Array) or each.dtype not in kinds or (each.ndim, each.layout) != (1, "C"):
            raise errors.TypingError(f"rows are of float32, keys also of 16 bits, without gaps, not {each}")
    return _tuple_of(types.float32, keys.count)(query_D, keys)


def _products(typing_context: Any, query_D: Any, keys: Any) -> Any:
    def generate(*given: Any) -> Any:
        return _generate(*given, squared=False)

    return _signature(query_D, keys), generate


def _squares(typing_context: Any, query_D: Any, keys: Any) -> Any:
    def generate(*given: Any) -> Any:
        return _generate(*given, squared=True)

    return _signature(query_D, keys), generate


products: Any = numba.extending.intrinsic(_products)
"""Inner products of a row with each of a tuple of rows; keys may have 16 bits (``half_kernels``)."""
squared_distances: Any = numba.extending.intrinsic(_squares)
"""Squared distances of a row from each of a tuple of rows, as there."""

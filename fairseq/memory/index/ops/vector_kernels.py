"""Instructions and loops that compilers do not write of themselves, or slowly: reading ahead, counting, extremes.

Shapes: C numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, compiler_features, errors, numba, types

_BYTE, _INT, _LONG, _FLOAT = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64), ir.FloatType()


def fetch_line(builder: Any, at: Any, *, to_write: bool = False, level: int = 1) -> None:
    """Write the instruction that fetches the line of a pointer into a level of the cache."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE, _INT, _INT, _INT])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    options = (ir.Constant(_INT, value) for value in (int(to_write), 4 - level, 1))
    builder.call(prefetch, [builder.bitcast(at, _BYTE), *options])


def _fetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        fetch_line(builder, builder.inttoptr(given[0], _BYTE))
        return context.get_dummy_value()

    return types.void(address), generate


fetch: Any = numba.extending.intrinsic(_fetch)
"""Fetch the line of an address, which will be read."""


class _Floats:
    """Writes loops over an array of float32, so many at a time, and one by one where there are no more so many."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        made = context.make_array(array_type)(context, builder, array)
        self._builder, self._data, self._count = builder, made.data, builder.extract_value(made.shape, 0)
        # Compared in vectors of AVX-512, the outcome is bits already; elsewhere these are collected from fewer lanes.
        self.lanes = 16 if "avx512f" in compiler_features() else 8

    def loop(self, step: Callable[[Any, int], None]) -> None:
        """Call with vectors of so many lanes."""
        size = self._count.type
        whole = self._builder.and_(self._count, ir.Constant(size, -self.lanes))
        for first, past, lanes in ((ir.Constant(size, 0), whole, self.lanes), (whole, self._count, 1)):
            with cgutils.for_range_slice(self._builder, first, past, ir.Constant(size, lanes)) as (at, _):
                place = self._builder.gep(self._data, [at], inbounds=True)
                place = self._builder.bitcast(place, ir.VectorType(_FLOAT, lanes).as_pointer())
                step(self._builder.load(place, align=4), lanes)

    def everywhere(self, value: Any, lanes: int) -> Any:
        """A vector with one number in all lanes."""
        kind, places = ir.VectorType(_FLOAT, lanes), ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
        vector = self._builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
        return self._builder.shuffle_vector(vector, vector, places)

    def count(self, hits: Any, lanes: int, total: Any) -> None:
        """Add the lanes that are true to a counter."""
        bits = self._builder.bitcast(hits, ir.IntType(lanes))
        counted = (
            self._builder.zext(bits, _LONG) if lanes == 1 else self._builder.zext(self._builder.ctpop(bits), _LONG)
        )
        self._builder.store(self._builder.add(self._builder.load(total), counted), total)

    def folded(self, name: str, vector: Any) -> Any:
        """The ``fmin`` or ``fmax`` of a vector's lanes, none of which is NaN."""
        name = f"llvm.vector.reduce.{name}.v{vector.type.count}f32"
        kind = ir.FunctionType(_FLOAT, [vector.type])
        function = cgutils.get_or_insert_function(self._builder.module, kind, name)
        return self._builder.call(function, [vector], fastmath=("nnan",))


def _require_floats(array_type: Any) -> None:
    if not isinstance(array_type, types.Array) or (array_type.dtype, array_type.ndim) != (types.float32, 1):
        raise errors.TypingError(f"an array of float32 is wanted, not {array_type}")
    if array_type.layout != "C":
        raise errors.TypingError(f"an array without gaps is wanted, not {array_type}")


def _count_reaching(typing_context: Any, number_C: Any, least: Any) -> Any:
    _require_floats(number_C)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        floats, total = _Floats(context, builder, signature.args[0], given[0]), cgutils.alloca_once(builder, _LONG)
        builder.store(ir.Constant(_LONG, 0), total)

        def step(vector: Any, lanes: int) -> None:
            floats.count(builder.fcmp_ordered(">=", vector, floats.everywhere(given[1], lanes)), lanes, total)

        floats.loop(step)
        return builder.load(total)

    return types.int64(number_C, types.float32), generate


count_reaching: Any = numba.extending.intrinsic(_count_reaching)
"""How many of some float32 are at least a number; NaN is not."""


def _finite_range(typing_context: Any, number_C: Any) -> Any:
    _require_floats(number_C)
    result = types.Tuple((types.float32, types.float32, types.int64))

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        floats, total = _Floats(context, builder, signature.args[0], given[0]), cgutils.alloca_once(builder, _LONG)
        builder.store(ir.Constant(_LONG, 0), total)
        ends = {"<": ("fmin", math.inf), ">": ("fmax", -math.inf)}
        kept = {}
        for lanes in (floats.lanes, 1):
            for compare, (_, start) in ends.items():
                kind = ir.VectorType(_FLOAT, lanes)
                kept[compare, lanes] = cgutils.alloca_once(builder, kind)
                builder.store(ir.Constant(kind, [start] * lanes), kept[compare, lanes])

        def step(vector: Any, lanes: int) -> None:
            is_found = builder.fcmp_ordered(">", vector, ir.Constant(vector.type, [-math.inf] * lanes))
            floats.count(is_found, lanes, total)
            for compare, (_, start) in ends.items():
                at = kept[compare, lanes]
                seen = builder.select(is_found, vector, ir.Constant(vector.type, [start] * lanes))
                before = builder.load(at)
                further = builder.fcmp_ordered(compare, seen, before)
                builder.store(builder.select(further, seen, before), at)

        floats.loop(step)
        outs = []
        for compare, (name, _) in ends.items():
            each = [floats.folded(name, builder.load(kept[compare, lanes])) for lanes in (floats.lanes, 1)]
            outs.append(builder.select(builder.fcmp_ordered(compare, *each), *each))
        return context.make_tuple(builder, signature.return_type, [*outs, builder.load(total)])

    return result(number_C), generate


finite_range: Any = numba.extending.intrinsic(_finite_range)
"""The least and the greatest of some float32, and how many there are; minus infinity and NaN are not among them.

Without any, the first is infinity and the second minus infinity.
"""

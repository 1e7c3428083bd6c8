"""Appending the keys of a tile that may be among the k best, 16 at a time where the CPU packs vectors (AVX-512).

Compilers write no loop of these instructions: where a candidate goes hangs on how many came before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import cgutils, compiler_features, numba, types

_LANES, _TILE_KEYS = 16, 64
_BIT, _INT, _LONG, _FLOAT = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_INT, _LANES)


def packs_vectors() -> bool:
    """True if the compiler has the instruction that packs the chosen lanes of a vector."""
    return "avx512f" in compiler_features()


def _everywhere(builder: Any, value: Any, kind: Any) -> Any:
    """A vector with one value in all lanes."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, result: Any, *given: Any) -> Any:
    function = ir.FunctionType(result, [each.type for each in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), given)


def _packed(builder: Any, vector: Any, mask: Any) -> Any:
    """The chosen lanes of a vector, first of all."""
    kind = f"v{vector.type.count}" + {_FLOAT: "f32", _INT: "i32", _LONG: "i64"}[vector.type.element]
    return _call(builder, f"llvm.x86.avx512.mask.compress.{kind}", vector.type, vector, vector, mask)


class _Packing:
    """Writes the loop, unrolled: four vectors of a tile."""

    def __init__(self, builder: Any, raw: Any, keys: list[Any], query: list[Any]) -> None:
        """Args.

        raw: type and place of the tile's products.
        keys: places of step, weight, size, bias and slack of its first key.
        query: zero, scale, width, share, slack, and the part of the gap (see ``append_expected``).
        """
        self._builder, self._raw, self._keys = builder, raw, keys
        self._query = [self._everywhere(each, _FLOATS) for each in query]

    def _everywhere(self, value: Any, kind: Any) -> Any:
        return _everywhere(self._builder, value, kind)

    def _load(self, at: Any, place: int, kind: Any) -> Any:
        at = self._builder.gep(at, [ir.Constant(_LONG, place)], inbounds=True)
        return self._builder.load(self._builder.bitcast(at, kind.as_pointer()), align=4)

    def _store(self, vector: Any, at: Any, place: Any) -> None:
        at = self._builder.gep(at, [place], inbounds=True)
        self._builder.store(vector, self._builder.bitcast(at, vector.type.as_pointer()), align=4)

    def bounds(self, place: int) -> tuple[Any, Any]:
        """What the scores of the keys from a place on are taken for, and how far that is below their upper bounds."""
        builder, (zero, scale, width, share, slack, part) = self._builder, self._query
        raw_kind, raw_at = self._raw
        raw = self._load(raw_at, place, ir.VectorType(raw_kind, _LANES))
        raw = builder.sitofp(raw, _FLOATS) if raw_kind == _INT else raw
        step, weight, size, bias, own_slack = (self._load(at, place, _FLOATS) for at in self._keys)
        error = builder.fmul(size, width)
        product = builder.fmul(builder.fadd(builder.fmul(builder.fadd(raw, zero), step), weight), scale)
        bound = builder.fadd(product, builder.fadd(error, bias))
        both = builder.fadd(error, builder.fadd(own_slack, slack))
        below = builder.fmul(builder.fadd(both, both), part)
        return builder.fadd(builder.fsub(bound, below), builder.fadd(share, slack)), below

    def append(self, hits: Any, first_id: Any, lower_at: Any, ids: tuple[Any, Any], counts: Any) -> Any:
        """Append what has its bit set. ``counts`` and the result: candidates so far, and their largest gap."""
        builder, (id_kind, ids_at), (filled, widest) = self._builder, ids, counts
        mask_kind, short = ir.VectorType(_BIT, _LANES), ir.IntType(_LANES)
        widest = self._everywhere(widest, _FLOATS)
        for place in range(0, _TILE_KEYS, _LANES):
            bits = builder.trunc(builder.lshr(hits, ir.Constant(_LONG, place)), short)
            mask = builder.bitcast(bits, mask_kind)
            lower, below = self.bounds(place)
            packed = _packed(builder, lower, mask)
            self._store(packed, lower_at, filled)
            numbers = _packed(builder, ir.Constant(_INTS, list(range(place, place + _LANES))), mask)
            numbers = numbers if id_kind == _INT else builder.sext(numbers, ir.VectorType(id_kind, _LANES))
            numbers = builder.add(numbers, self._everywhere(first_id, numbers.type))
            self._store(numbers, ids_at, filled)
            wider = builder.and_(mask, builder.fcmp_ordered(">", below, widest))
            widest = builder.select(wider, below, widest)
            filled = builder.add(filled, builder.zext(_call(builder, "llvm.ctpop.i16", short, bits), _LONG))
        kind = ir.FunctionType(_FLOAT, [_FLOATS])
        largest = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v16f32")
        return filled, builder.call(largest, [widest], fastmath=("nnan",))


def _appending(
    typing_context: Any, raw_X: Any, hits: Any, step: Any, weight: Any, size: Any, bias: Any, slack: Any, key: Any,
    first_id: Any, query: Any, lower_NC: Any, ids_NC: Any, n: Any, filled: Any, widest: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Types, and what is generated."""
    given_types = (raw_X, hits, step, weight, size, bias, slack, key, first_id, query, lower_NC, ids_NC, n, filled,
                   widest)  # fmt: skip
    result = types.Tuple((types.int64, types.float32))

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        def made(i: int) -> Any:
            return context.make_array(signature.args[i])(context, builder, given[i])

        keys = [builder.gep(made(i).data, [given[7]], inbounds=True) for i in range(2, 7)]
        raw_kind = _INT if signature.args[0].dtype == types.int32 else _FLOAT
        rows = []
        for i in (10, 11):
            columns = builder.extract_value(made(i).shape, 1)
            rows.append(builder.gep(made(i).data, [builder.mul(given[12], columns)], inbounds=True))
        id_kind = _INT if signature.args[11].dtype == types.int32 else _LONG
        first = builder.add(given[8], given[7])
        first = builder.trunc(first, _INT) if id_kind == _INT else first
        packing = _Packing(builder, (raw_kind, made(0).data), keys, cgutils.unpack_tuple(builder, given[9]))
        counts = packing.append(given[1], first, rows[0], (id_kind, rows[1]), (given[13], given[14]))
        return context.make_tuple(builder, signature.return_type, counts)

    return result(*given_types), generate


append_vectors: Any = numba.extending.intrinsic(_appending)
"""The intrinsic ``(raw_X, hits, step_M, weight_M, size_M, bias_M, slack_M, key, first_id, query, lower_NC, ids_NC, n,
filled, widest)``; ``query`` is (zero, scale, width, share, slack, part). Returns: the new ``filled`` and ``widest``.

It writes whole vectors: of what comes after the candidates so far, 64 places must be free, and are overwritten.
"""


def _num_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.ctpop(given[0])

    return types.int64(types.int64), generate


num_bits: Any = numba.extending.intrinsic(_num_bits)
"""How many bits are set."""


def _keeping(typing_context: Any, lower_C: Any, ids_C: Any, filled: Any, lowest: Any) -> Any:
    """Types, and what is generated."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, given[i]).data for i in (0, 1)]
        kinds = [_FLOATS, ir.VectorType(_INT if signature.args[1].dtype == types.int32 else _LONG, _LANES)]
        kept = cgutils.alloca_once(builder, _LONG)
        builder.store(ir.Constant(_LONG, 0), kept)
        lane = ir.Constant(ir.VectorType(_LONG, _LANES), list(range(_LANES)))
        step = ir.Constant(_LONG, _LANES)
        with cgutils.for_range_slice(builder, ir.Constant(_LONG, 0), given[2], step) as (at, _):
            places = [
                builder.bitcast(builder.gep(array, [at], inbounds=True), kind.as_pointer())
                for array, kind in zip(arrays, kinds)
            ]
            vectors = [builder.load(place, align=4) for place in places]
            is_there = builder.icmp_signed("<", lane, _everywhere(builder, builder.sub(given[2], at), lane.type))
            reaches = builder.fcmp_ordered(">=", vectors[0], _everywhere(builder, given[3], _FLOATS))
            mask, filled = builder.and_(is_there, reaches), builder.load(kept)
            for array, vector in zip(arrays, vectors):
                _store_chosen(builder, vector, mask, builder.gep(array, [filled], inbounds=True))
            bits = builder.bitcast(mask, ir.IntType(_LANES))
            builder.store(builder.add(filled, builder.zext(builder.ctpop(bits), _LONG)), kept)
        return builder.load(kept)

    return types.int64(lower_C, ids_C, types.int64, types.float32), generate


def _store_chosen(builder: Any, vector: Any, mask: Any, at: Any) -> None:
    """Store the chosen lanes one after the other, and anything in the places up to a whole vector."""
    if vector.type.element == _LONG:  # twice as wide as what the CPU packs
        half, chosen = _LANES // 2, ir.VectorType(_INT, _LANES // 2)
        for first in (0, half):
            lanes = ir.Constant(chosen, list(range(first, first + half)))
            part, own = builder.shuffle_vector(vector, vector, lanes), builder.shuffle_vector(mask, mask, lanes)
            place = builder.bitcast(at, part.type.as_pointer())
            builder.store(_packed(builder, part, own), place, align=8)
            bits = builder.bitcast(own, ir.IntType(half))
            at = builder.gep(at, [builder.zext(builder.ctpop(bits), _LONG)], inbounds=True)
        return
    builder.store(_packed(builder, vector, mask), builder.bitcast(at, vector.type.as_pointer()), align=4)


keep_vectors: Any = numba.extending.intrinsic(_keeping)
"""The intrinsic ``(lower_C, ids_C, filled, lowest)``: of the first ``filled`` candidates it keeps those whose numbers
reach ``lowest``, in place. Returns: how many these are.

It reads and writes whole vectors: 16 places behind the candidates must be there, and are overwritten.
"""

"""Sums of table entries for the codes of many keys, in bytes: one instruction looks up 64 of them in 128 entries.

A table of float32 entries is rounded to bytes of one step. An entry is rounded down after adding a number that is drawn
once for each part of a key, so that the errors are uniform and independent: see ``bounded_scores.most_steps``.

Import where used: numba takes half a second to load.

Shapes: M parts of a key, J = 256 codewords of a part, S keys of a list, B bytes, P = GROUP keys of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from fairseq.memory.index.ops.kernels import GROUP, compiled, finite_range
from fairseq.memory.index.ops.numba_library import cgutils, numba, types

_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(16), 32)


@compiled()
def round_table(table_MJ: Any, drawn_M: Any, byte_MJ: Any) -> tuple[Any, Any, Any]:
    """Write the bytes of a table.

    Returns: the step; what is added to a sum of bytes, in units of it; what sums of entries are at most in size.
    """
    parts, words = table_MJ.shape
    bits_MJ, ends_2 = table_MJ.view(np.int32), np.empty(2, np.int32)
    widest, total, lowest = np.float32(0.0), np.float32(0.0), np.empty(parts, np.float32)
    for m in range(parts):
        finite_range(bits_MJ[m], ends_2)
        least, most = ends_2.view(np.float32)
        lowest[m], widest = least, max(widest, most - least)
        total += max(abs(least), abs(most))
    step = max(widest, np.float32(1e-30)) / np.float32(254.0)
    inverse, base = np.float32(1.0) / step, 0.0
    for m in range(parts):
        for j in range(words):
            byte_MJ[m, j] = np.uint8(np.int32((table_MJ[m, j] - lowest[m]) * inverse + drawn_M[m]))
        base += lowest[m] * inverse + (0.5 - drawn_M[m])
    return step, np.float32(base), total


@compiled("(u1[:,::1], u1[::1])")
def lay_out_codes(code_SM: Any, code_B: Any) -> None:
    """Write codes group after group, of each one part after the other.

    Of two neighbouring bytes the first is of the first half of a group's keys, the second of the other half, so that
    their sums come in the order of the keys.
    """
    size, parts = code_SM.shape
    for s in range(size):
        group, place = s // GROUP, s % GROUP
        at = group * parts * GROUP + 2 * (place % (GROUP // 2)) + place // (GROUP // 2)
        for m in range(parts):
            code_B[at + m * GROUP] = code_SM[s, m]


def _shuffled(typing_context: Any, byte_MJ: Any, code_B: Any, at: Any, sum_P: Any) -> Any:
    """AVX-512 VBMI: 128 entries are looked up by two registers, twice."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        made = {i: context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 1, 3)}
        size = given[2].type

        def number(value: int) -> Any:
            return ir.Constant(size, value)

        parts = builder.extract_value(made[0].shape, 0)

        def load(base: Any, offset: Any) -> Any:
            place = builder.gep(builder.bitcast(base, ir.IntType(8).as_pointer()), [offset], inbounds=True)
            return builder.load(builder.bitcast(place, _BYTES.as_pointer()), align=1)

        look_up = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_BYTES, [_BYTES] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
        )
        low = ir.Constant(_WORDS, [0xFF] * 32)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, [0] * 32)) for _ in range(2)]
        with cgutils.for_range(builder, parts) as loop:
            code = load(made[1].data, builder.add(given[2], builder.mul(loop.index, number(GROUP))))
            row = builder.mul(loop.index, number(256))
            quarter = [load(made[0].data, builder.add(row, number(64 * i))) for i in range(4)]
            halves = [builder.call(look_up, (quarter[i], code, quarter[i + 1])) for i in (0, 2)]
            is_high = builder.icmp_signed("<", code, ir.Constant(_BYTES, [0] * 64))
            found = builder.bitcast(builder.select(is_high, halves[1], halves[0]), _WORDS)
            both = (builder.and_(found, low), builder.lshr(found, ir.Constant(_WORDS, [8] * 32)))
            for total, more in zip(sums, both):
                builder.store(builder.add(builder.load(total), more), total)
        for half, total in enumerate(sums):
            to = builder.gep(made[3].data, [number(half * GROUP // 2)], inbounds=True)
            builder.store(builder.load(total), builder.bitcast(to, _WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(byte_MJ, code_B, types.intp, sum_P), generate


@compiled()
def _one_by_one(byte_MJ: Any, code_B: Any, at: int, sum_P: Any) -> None:
    """What every processor can do."""
    half = GROUP // 2
    for i in range(GROUP):
        sum_P[i] = 0
    for m in range(len(byte_MJ)):
        for i in range(half):
            first = at + m * GROUP + 2 * i
            sum_P[i] += byte_MJ[m, code_B[first]]
            sum_P[half + i] += byte_MJ[m, code_B[first + 1]]


SUMS: dict[str, Any] = {"avx512_vbmi": numba.extending.intrinsic(_shuffled), "plain": _one_by_one}
"""``(byte_MJ, code_B, at, sum_P)`` by instruction set: write the sums of a group's keys, with codes from a byte on."""

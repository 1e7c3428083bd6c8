"""Sums of table entries for the codes of many keys, in bytes: one instruction looks up 64 of them in 128 entries.

A table of float32 entries is rounded to 16 bits of one step, whose high and low bytes are looked up separately. With 8
bits the widest part makes the step so coarse that of 18,000 keys of a real store 6,000 may be among the best 1,024;
with 16 it is 1,052, and the sums take a quarter longer.

Import where used: numba takes half a second to load.

Shapes: M parts of a key, J = 256 codewords of a part, S keys of a list, B bytes, P = GROUP keys of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from fairseq.memory.index.ops.kernels import GROUP, compiled
from fairseq.memory.index.ops.numba_library import cgutils, numba, types
from fairseq.memory.index.ops.vector_kernels import fetch_line, finite_range

_STEPS = np.float32(65534.0)  # 65535 at most, however the division is rounded
MOST_STEPS = np.float32(0.51)
"""How far a rounded entry may be off; its arithmetic in float32 is off by less than a hundredth."""
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(16), 32)


@compiled()
def round_table(table_MJ: Any, byte_2MJ: Any) -> tuple[Any, Any, Any]:
    """Write the high and the low bytes of a table.

    Returns: the step; what is added to a sum of entries, in units of it; what sums of entries are at most in size.
    """
    parts, words = table_MJ.shape
    widest, total, lowest = np.float32(0.0), np.float32(0.0), np.empty(parts, np.float32)
    for m in range(parts):
        least, most, _ = finite_range(table_MJ[m])
        lowest[m], widest = least, max(widest, most - least)
        total += max(abs(least), abs(most))
    step = max(widest, np.float32(1e-30)) / _STEPS
    inverse, base = np.float32(1.0) / step, 0.0
    for m in range(parts):
        for j in range(words):
            entry = np.int32((table_MJ[m, j] - lowest[m]) * inverse + np.float32(0.5))
            byte_2MJ[0, m, j], byte_2MJ[1, m, j] = np.uint8(entry >> np.int32(8)), np.uint8(entry & np.int32(0xFF))
        base += lowest[m] * inverse
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


def _shuffled(typing_context: Any, byte_2MJ: Any, code_B: Any, at: Any, next_at: Any, sum_2P: Any) -> Any:
    """AVX-512 VBMI: 128 entries are looked up by two registers, twice.

    A group's codes are a page, where the CPU's own prefetching ends.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        made = {i: context.make_array(signature.args[i])(context, builder, given[i]) for i in (0, 1, 4)}
        size, eights = given[2].type, ir.Constant(_WORDS, [8] * 32)

        def number(value: int) -> Any:
            return ir.Constant(size, value)

        parts = builder.extract_value(made[0].shape, 1)

        def load(base: Any, offset: Any) -> Any:
            place = builder.gep(builder.bitcast(base, ir.IntType(8).as_pointer()), [offset], inbounds=True)
            return builder.load(builder.bitcast(place, _BYTES.as_pointer()), align=1)

        look_up = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_BYTES, [_BYTES] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
        )
        sums = [[cgutils.alloca_once_value(builder, ir.Constant(_WORDS, [0] * 32)) for _ in range(2)] for _ in range(2)]
        with cgutils.for_range(builder, parts) as loop:
            line = builder.mul(loop.index, number(GROUP))
            fetch_line(builder, builder.gep(made[1].data, [builder.add(given[3], line)]))
            code = load(made[1].data, builder.add(given[2], line))
            is_high = builder.icmp_signed("<", code, ir.Constant(_BYTES, [0] * 64))
            for table, pair in enumerate(sums):
                row = builder.mul(builder.add(loop.index, builder.mul(number(table), parts)), number(256))
                quarter = [load(made[0].data, builder.add(row, number(64 * i))) for i in range(4)]
                halves = [builder.call(look_up, (quarter[i], code, quarter[i + 1])) for i in (0, 2)]
                found = builder.bitcast(builder.select(is_high, halves[1], halves[0]), _WORDS)
                # The first sum has the other keys' entries too, times 256 and modulo 65536: they are taken off below.
                for total, more in zip(pair, (found, builder.lshr(found, eights))):
                    builder.store(builder.add(builder.load(total), more), total)
        for table, pair in enumerate(sums):
            mixed, second = map(builder.load, pair)
            first = builder.sub(mixed, builder.shl(second, eights))
            for half, total in enumerate((first, second)):
                to = builder.gep(made[4].data, [number((2 * table + half) * GROUP // 2)], inbounds=True)
                builder.store(total, builder.bitcast(to, _WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(byte_2MJ, code_B, types.intp, types.intp, sum_2P), generate


@compiled()
def _one_by_one(byte_2MJ: Any, code_B: Any, at: int, next_at: int, sum_2P: Any) -> None:
    """What every processor can do."""
    half = GROUP // 2
    for table in range(2):
        for i in range(GROUP):
            sum_2P[table, i] = 0
        for m in range(byte_2MJ.shape[1]):
            for i in range(half):
                first = at + m * GROUP + 2 * i
                sum_2P[table, i] += byte_2MJ[table, m, code_B[first]]
                sum_2P[table, half + i] += byte_2MJ[table, m, code_B[first + 1]]


SUMS: dict[str, Any] = {"avx512_vbmi": numba.extending.intrinsic(_shuffled), "plain": _one_by_one}
"""``(byte_2MJ, code_B, at, next_at, sum_2P)`` by instruction set: write the sums of a group's keys in both tables, with
codes from a byte on; those from ``next_at`` on are read next."""

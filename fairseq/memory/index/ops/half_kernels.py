"""Numbers of 16 bits as float32, in the compiler's own language: numba knows neither float16 nor bfloat16 on a CPU.

Kernels take their bits: those of float16 as uint16, those of bfloat16 as int16. Every one is a float32 exactly.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir

from fairseq.memory.index.ops.numba_library import compiler_features, errors, numba, types

READS_FLOAT16 = "f16c" in compiler_features() or platform.machine() in ("aarch64", "arm64")
"""True if numba compiles for a CPU with instructions for float16; there is nothing else that it could take for them."""

KINDS = (types.float32, types.uint16, types.int16)
"""What keys may be: float32, or the bits of float16 or bfloat16."""


def widened(builder: Any, value: Any, kind: Any) -> Any:
    """The float32, or vector of them, that a loaded number or vector of one of ``KINDS`` is."""
    if kind == types.float32:
        return value
    count = getattr(value.type, "count", 0)

    def of(single: Any) -> Any:
        return ir.VectorType(single, count) if count else single

    if kind == types.uint16:
        return builder.fpext(builder.bitcast(value, of(ir.HalfType())), of(ir.FloatType()))
    whole = builder.zext(value, of(ir.IntType(32)))
    shift = ir.Constant(whole.type, [16] * count if count else 16)
    return builder.bitcast(builder.shl(whole, shift), of(ir.FloatType()))


def loaded_type(kind: Any, lanes: int) -> Any:
    """What so many neighbouring numbers of one of ``KINDS`` are loaded as."""
    single = ir.FloatType() if kind == types.float32 else ir.IntType(16)
    return ir.VectorType(single, lanes) if lanes > 1 else single


def _as_float(typing_context: Any, x: Any) -> Any:
    if x not in KINDS:
        raise errors.TypingError(f"a float32, or the bits of a float16 or bfloat16, not {x}")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return widened(builder, given[0], x)

    return types.float32(x), generate


as_float: Any = numba.extending.intrinsic(_as_float)
"""The float32 that a number of one of ``KINDS`` is."""

"""Numbers taken apart and put together again within compiled loops, in operations that compilers vectorize.

A call of the C library's exp keeps a loop from being vectorized: it then takes ten times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.numba_library import numba, types


def _reinterpreted(source: Any, target: Any, kind: Any) -> Any:
    """The intrinsic that takes the bits of one type for another."""

    def typed(typing_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], kind)

        return target(source), generate

    return numba.extending.intrinsic(typed)


bits_of: Any = _reinterpreted(types.float32, types.uint32, ir.IntType(32))
float_of: Any = _reinterpreted(types.uint32, types.float32, ir.FloatType())

_LOG2_E = np.float32(1.44269504)
# ln 2 in two parts: the first has so few bits that its product with a whole number is exact.
_LN_2, _LN_2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Added and subtracted again, it rounds to a whole number, which the sum's low bits hold; 127 is an exponent's bias.
_ROUNDING = np.float32(12582912.0 + 127.0)
_MANTISSA_BITS = np.uint32(23)
# exp(r) for r within half of ln 2 (Cephes' expf), to half a unit of the last place more than rounding.
_C2, _C3, _C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)


@compiled(fastmath={"contract"})
def exp(x: Any) -> Any:
    """``e ** x`` for x from -87 to 88, to float32 rounding; nan for nan."""
    shifted = x * _LOG2_E + _ROUNDING
    whole = shifted - _ROUNDING
    r = (x - whole * _LN_2) - whole * _LN_2_REST
    p = (((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r * r + r + np.float32(1.0)
    return p * float_of(bits_of(shifted) << _MANTISSA_BITS)

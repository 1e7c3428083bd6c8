"""Rounding keys and queries to few bits, compiled by numba; what the numbers mean is in ``bounded_scores``.

Import where used: numba takes half a second to load.

Shapes: M keys of a block, N queries, D width, E columns that are multiplied (D, filled up).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import ANY_ORDER, compiled
from fairseq.memory.index.ops.tile_product_kernels import LANES

_SMALLEST = np.float32(1e-30)
_ROUNDING = np.float32(2e-6)  # of sums in float32, see ``bounded_scores``


@compiled()
def _reach(bits_D: Any) -> Any:
    """The largest size of an entry, as the bits of a float32: without their sign they are ordered as the numbers are.

    Of floats, numba's maximum is not vectorized.
    """
    reach = np.int32(0)
    for d in range(len(bits_D)):
        reach = max(reach, bits_D[d] & np.int32(0x7FFFFFFF))
    return reach


@compiled()
def _rows_of(about_5D: Any) -> tuple[Any, Any, Any, Any, Any]:
    # Unpacked at once, rows are not known to be without gaps, and nothing is vectorized.
    return about_5D[0], about_5D[1], about_5D[2], about_5D[3], about_5D[4]


@compiled(fastmath=ANY_ORDER)
def _centred(x_D: Any, mean_D: Any, balance_D: Any, linear_D: Any, out_D: Any) -> tuple[Any, Any, Any]:
    """Write ``(x - mean) * balance``. Returns: its squared length, that of ``x - mean``, and the latter's product with
    ``linear``.
    """
    balanced, square, linear = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for d in range(len(x_D)):
        x = x_D[d] - mean_D[d]
        y = x * balance_D[d]
        out_D[d] = y
        balanced += y * y
        square += x * x
        linear += x * linear_D[d]
    return balanced, square, linear


@compiled(fastmath=ANY_ORDER)
def _rounded(balanced_D: Any, inverse: Any, levels: Any, own_D: Any, other_D: Any, out_D: Any) -> tuple[Any, Any, Any]:
    """Write ``floor(x / step + 1/2 - own)`` as integers. Returns: their sum, that of their products with ``other``, and
    the squared length of ``integer + own``, which stands for x.
    """
    total, weighted, square = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    half = np.float32(0.5)
    for d in range(len(balanced_D)):
        rounded = np.floor(balanced_D[d] * inverse + (half - own_D[d]))
        rounded = min(max(rounded, -levels), levels)
        out_D[d] = np.int8(rounded)
        total += rounded
        weighted += rounded * other_D[d]
        square += (rounded + own_D[d]) * (rounded + own_D[d])
    return total, weighted, square


@compiled(fastmath=ANY_ORDER)
def _length(x_D: Any) -> Any:
    square = np.float32(0.0)
    for d in range(len(x_D)):
        square += x_D[d] * x_D[d]
    return np.sqrt(square)


@compiled()
def _bias(square: Any, linear: Any, linear_length: Any, by_distance: bool) -> tuple[Any, Any]:
    """What a key adds to its scores at most, and half of how much that may be too high."""
    half = np.float32(0.5) * square if by_distance else np.float32(0.0)
    slack = _ROUNDING * (half + linear_length * np.sqrt(square))
    return linear - half + slack, slack


@compiled()
def _interleave(four_F: Any, first: int, key_F: Any) -> None:
    """Put a row, four columns at a time, in its place among the 16 of a group."""
    for f in range(len(four_F)):
        key_F[first + f * LANES] = four_F[f]


@compiled(forceinline=True)
def bounds(
    raw: Any, zero: Any, step: Any, weight: Any, scale: Any, size: Any, width: Any, bias: Any, slack: Any
) -> tuple[Any, Any]:
    """What a score is at most, and how far it may be below that; see ``bounded_scores``."""
    error = size * width
    bound = ((np.float32(raw) + zero) * step + weight) * scale + (error + bias)
    return bound, np.float32(2.0) * (error + slack)


@compiled("(f4[:,::1], f4[:,::1], i8, f4, f4, b1, i8, b1, i1[::1], i4[::1], f4[:,::1])")
def round_keys(
    keys_MD: Any, about_5D: Any, columns: int, levels: Any, ratio: Any, by_distance: bool, zero: int,
    interleaved: bool, key_B: Any, start_M: Any, about_5M: Any,
) -> None:  # fmt: skip
    """Round the keys of a block.

    Args:
        about_5D: mean, balance, what the linear part of a score is the product with, and the two remainders: see
            ``RoundedQueries``.
        columns: E.
        ratio: steps are at most this many times what stands for a key's length.
        zero: what is added to the entries of queries.
        interleaved: as ``tile_product_kernels`` has it; otherwise row after row.
        key_B: gets the integers.
        start_M: gets what takes ``zero`` off the products.
        about_5M: gets step, weight, size, bias and slack of each key.
    """
    width = keys_MD.shape[1]
    reach_1 = np.empty(1, np.int32)
    balanced_D, row_E = np.empty(width, np.float32), np.zeros(columns, np.int8)
    four_F, key_F = row_E.view(np.int32), key_B.view(np.int32)
    mean_D, balance_D, linear_D, own_D, other_D = _rows_of(about_5D)
    linear_length = _length(linear_D)
    for m in range(len(keys_MD)):
        _, square, linear = _centred(keys_MD[m], mean_D, balance_D, linear_D, balanced_D)
        reach_1[0] = _reach(balanced_D.view(np.int32))
        step = max(reach_1.view(np.float32)[0], _SMALLEST) / levels
        total, weighted, length = _rounded(balanced_D, np.float32(1.0) / step, levels, own_D, other_D, row_E)
        if interleaved:
            _interleave(four_F, m // LANES * LANES * len(four_F) + m % LANES, key_F)
        else:
            key_B[m * columns : (m + 1) * columns] = row_E
        start_M[m] = -zero * np.int32(total)
        about_5M[0, m], about_5M[1, m] = step, step * weighted
        about_5M[2, m] = max(step * np.sqrt(length), step / ratio)
        about_5M[3, m], about_5M[4, m] = _bias(square, linear, linear_length, by_distance)


@compiled("(f4[:,::1], f4[:,::1], f4, i8, i1[:,::1], f4[:,::1])")
def round_queries(query_ND: Any, about_5D: Any, levels: Any, zero: int, row_NE: Any, about_N3: Any) -> None:
    """Round queries: each entry plus ``zero``. ``about_N3`` gets step, the products of remainders, and the length."""
    width = query_ND.shape[1]
    reach_1 = np.empty(1, np.int32)
    balanced_D, row_D = np.empty(width, np.float32), np.empty(width, np.int8)
    mean_D, balance_D, linear_D, own_D, other_D = _rows_of(about_5D)
    both = np.float32(0.0)
    for d in range(width):
        both += own_D[d] * other_D[d]
    for n in range(len(query_ND)):
        square, _, _ = _centred(query_ND[n], mean_D, balance_D, linear_D, balanced_D)
        reach_1[0] = _reach(balanced_D.view(np.int32))
        step = max(reach_1.view(np.float32)[0], _SMALLEST) / levels
        _, weighted, _ = _rounded(balanced_D, np.float32(1.0) / step, levels, own_D, other_D, row_D)
        for d in range(width):
            row_NE[n, d] = np.int8(np.int32(row_D[d]) + zero)
        about_N3[n, 0], about_N3[n, 1], about_N3[n, 2] = step, weighted + both, np.sqrt(square)


@compiled("(f4[:,::1], f4[:,::1], b1, f4[:,::1], f4[:,::1])")
def centre_keys(keys_MD: Any, about_5D: Any, by_distance: bool, centred_MD: Any, about_5M: Any) -> None:
    """Keys that are multiplied as they are: less their mean, with what :func:`round_keys` says of each."""
    width = keys_MD.shape[1]
    balanced_D = np.empty(width, np.float32)
    mean_D, balance_D, linear_D, _, _ = _rows_of(about_5D)
    linear_length = _length(linear_D)
    for m in range(len(keys_MD)):
        balanced, square, linear = _centred(keys_MD[m], mean_D, balance_D, linear_D, balanced_D)
        for d in range(width):
            centred_MD[m, d] = keys_MD[m, d] - mean_D[d]
        about_5M[0, m], about_5M[1, m], about_5M[2, m] = 1.0, 0.0, np.sqrt(balanced)
        about_5M[3, m], about_5M[4, m] = _bias(square, linear, linear_length, by_distance)

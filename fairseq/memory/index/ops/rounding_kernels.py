"""Rounding keys and queries to few bits, compiled by numba; what the numbers mean is in ``bounded_scores``.

Import where used: numba takes half a second to load.

Shapes: M keys of a block, N queries, D width, E columns that are multiplied (D, filled up).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.half_kernels import as_float
from fairseq.memory.index.ops.kernels import ANY_ORDER, KEY_TYPES, compiled
from fairseq.memory.index.ops.tile_loop_kernels import FINE, FINE_BITS, LANES
from fairseq.memory.index.ops.tile_product_kernels import interleave

_SMALLEST = np.float32(1e-30)
_SMALL_SQUARE, _LARGE_SQUARE = np.float32(1e-30), np.float32(3e38)
_ROUNDING = np.float32(2e-6)  # of sums in float32, see ``bounded_scores``
_ROUNDING_TYPES = "f4[:,::1], i2[:,::1], i8, f4, f4, f4, f4, b1, i8, b1"


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
        x = as_float(x_D[d]) - mean_D[d]
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

    Args:
        out_D: of 8 bits, or of 16 where levels are more.
    """
    total, weighted, square = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    half = np.float32(0.5)
    for d in range(len(balanced_D)):
        rounded = np.floor(balanced_D[d] * inverse + (half - own_D[d]))
        rounded = min(max(rounded, -levels), levels)
        out_D[d] = np.int32(rounded)
        total += rounded
        weighted += rounded * other_D[d]
        square += (rounded + own_D[d]) * (rounded + own_D[d])
    return total, weighted, square


@compiled()
def _write_parts(whole_D: Any, own_D: Any, other_D: Any, zero: int, row_E: Any) -> tuple[Any, Any, Any]:
    """Write the two parts of fine entries, each plus ``zero``: first all first ones.

    Args:
        own_D: twice the shift of second parts (see ``bounded_scores``), less one.
        other_D: that of what is multiplied with these.
    Returns: the sum of first parts, that of second ones times half of ``other``, and the squared length of second
        parts less half of ``own``.
    """
    width, middle = len(whole_D), len(row_E) // 2
    first_D, second_D = row_E[:width], row_E[middle : middle + width]
    total, weighted, square = np.int32(0), np.int32(0), np.int32(0)
    bits, zero_, fine = np.int32(FINE_BITS), np.int32(zero), np.int32(FINE)
    for d in range(width):
        whole, own = np.int32(whole_D[d]), np.int32(own_D[d])
        first = (whole + ((fine - own) >> np.int32(1))) >> bits
        second = whole - first * fine
        first_D[d] = np.int8(first + zero_)
        second_D[d] = np.int8(second + zero_)
        total += first
        weighted += second * np.int32(other_D[d])
        rest = second + second - own
        square += rest * rest
    return total, np.float32(0.5) * np.float32(weighted), np.float32(0.25) * np.float32(square)


@compiled(fastmath=ANY_ORDER)
def _length(x_D: Any) -> Any:
    square = np.float32(0.0)
    for d in range(len(x_D)):
        square += x_D[d] * x_D[d]
    return np.sqrt(square)


@compiled()
def length_of(square: Any, reach: Any, width: int) -> Any:
    """The length of a vector by its square and its largest entry; at most that where float32 has no such squares."""
    has_square = _SMALL_SQUARE < square < _LARGE_SQUARE
    return np.sqrt(square) if has_square else reach * np.float32(np.sqrt(width))


@compiled()
def _step(square: Any, reach: Any, width: int, levels: Any, longest: Any) -> Any:
    """What a vector is divided by, so that neither its entries nor, where that matters, its length become too large."""
    step = max(reach, _SMALLEST) / levels
    return max(step, length_of(square, reach, width) / longest) if longest > np.float32(0.0) else step


@compiled()
def _bias(square: Any, linear: Any, linear_length: Any, by_distance: bool) -> tuple[Any, Any]:
    """What a key adds to its scores at most, and half of how much that may be too high."""
    half = np.float32(0.5) * square if by_distance else np.float32(0.0)
    slack = _ROUNDING * (half + linear_length * np.sqrt(square))
    return linear - half + slack, slack


@compiled()
def _lay_out(row_LE: Any, key_B: Any, first: int) -> None:
    """Interleave a group of 16 rows."""
    columns = row_LE.shape[1]
    if columns % (4 * LANES) == 0:
        interleave(row_LE, key_B, first)
        return
    four_LF, four_F = row_LE.view(np.int32), key_B[first : first + LANES * columns].view(np.int32)
    for f in range(columns // 4):
        for i in range(LANES):
            four_F[LANES * f + i] = four_LF[i, f]


@compiled(forceinline=True)
def bounds(
    raw: Any, zero: Any, step: Any, weight: Any, scale: Any, size: Any, width: Any, bias: Any, slack: Any
) -> tuple[Any, Any]:
    """What a score is at most, and how far it may be below that; see ``bounded_scores``."""
    error = size * width
    bound = ((np.float32(raw) + zero) * step + weight) * scale + (error + bias)
    return bound, np.float32(2.0) * (error + slack)


@compiled(*(f"({keys}[:,::1], {_ROUNDING_TYPES}, i1[::1], i4[::1], f4[:,::1])" for keys in KEY_TYPES))
def round_keys(
    keys_MD: Any, about_5D: Any, shift_2D: Any, columns: int, levels: Any, longest: Any, ratio: Any, rest: Any,
    by_distance: bool, zero: int, interleaved: bool, key_B: Any, start_M: Any, about_5M: Any,
) -> None:  # fmt: skip
    """Round the keys of a block, float32 or of 16 bits (``half_kernels``).

    Args:
        about_5D: mean, balance, what the linear part of a score is the product with, and the two remainders: see
            ``RoundedQueries``.
        shift_2D: ``own`` and ``other`` of :func:`_write_parts`; without columns where entries have one part.
        columns: E.
        longest: length of a vector of wide entries; 0 for others.
        ratio: steps are at most this many times what stands for a key's length.
        rest: what is left of second parts is, in steps, at most this many times it.
        zero: what is added to the entries of queries.
        interleaved: as ``tile_loop_kernels`` has it; otherwise row after row.
        key_B: gets the integers.
        start_M: gets what takes ``zero`` off the products.
        about_5M: gets step, weight, size, bias and slack of each key.
    """
    width, has_parts = keys_MD.shape[1], shift_2D.shape[1] > 0
    reach_1 = np.empty(1, np.int32)
    balanced_D, whole_D = np.empty(width, np.float32), np.empty(width, np.int16)
    row_LE = np.zeros((LANES, columns), np.int8)
    word_LF = row_LE.view(np.int16)
    mean_D, balance_D, linear_D, own_D, other_D = _rows_of(about_5D)
    linear_length = _length(linear_D)
    for m in range(len(keys_MD)):
        balanced, square, linear = _centred(keys_MD[m], mean_D, balance_D, linear_D, balanced_D)
        reach_1[0] = _reach(balanced_D.view(np.int32))
        step = _step(balanced, reach_1.view(np.float32)[0], width, levels, longest)
        inverse = np.float32(1.0) / step
        about_5M[0, m], row_E, size = step, row_LE[m % LANES], np.float32(1.0) / ratio
        if longest > np.float32(0.0):
            total, weighted, length = _rounded(balanced_D, inverse, levels, own_D, other_D, word_LF[m % LANES])
            start_M[m] = 0
        elif has_parts:
            total, weighted, length = _rounded(balanced_D, inverse, levels, own_D, other_D, whole_D)
            first, more, square_left = _write_parts(whole_D, shift_2D[0], shift_2D[1], 0, row_E)
            start_M[m] = -zero * (np.int64(total) + np.int64(first))  # it is added to both parts of a query's entries
            about_5M[0, m], weighted = step * np.float32(FINE), weighted + more
            size = max(size, np.sqrt(square_left) / rest)
        else:
            total, weighted, length = _rounded(balanced_D, inverse, levels, own_D, other_D, row_E)
            start_M[m] = -zero * np.int32(total)
        if not interleaved:
            key_B[m * columns : (m + 1) * columns] = row_E
        elif m % LANES == LANES - 1 or m == len(keys_MD) - 1:
            row_LE[m % LANES + 1 :] = 0
            _lay_out(row_LE, key_B, m // LANES * LANES * columns)
        about_5M[1, m], about_5M[2, m] = step * weighted, step * max(np.sqrt(length), size)
        about_5M[3, m], about_5M[4, m] = _bias(square, linear, linear_length, by_distance)


@compiled("(f4[:,::1], f4[:,::1], i2[:,::1], f4, f4, i8, i1[:,::1], f4[:,::1])")
def round_queries(
    query_ND: Any, about_5D: Any, shift_2D: Any, levels: Any, longest: Any, zero: int, row_NE: Any, about_N3: Any
) -> None:
    """Round queries, see :func:`round_keys`: each entry plus ``zero``.

    ``about_N3`` gets step, the products of remainders, and the length.
    """
    width, has_parts = query_ND.shape[1], shift_2D.shape[1] > 0
    word_NF = row_NE.view(np.int16)
    reach_1 = np.empty(1, np.int32)
    balanced_D, whole_D = np.empty(width, np.float32), np.empty(width, np.int16)
    mean_D, balance_D, linear_D, own_D, other_D = _rows_of(about_5D)
    both = np.float32(0.0)
    for d in range(width):
        both += own_D[d] * other_D[d]
        if has_parts:
            both -= np.float32(0.25) * np.float32(shift_2D[0, d]) * np.float32(shift_2D[1, d])
    for n in range(len(query_ND)):
        square, _, _ = _centred(query_ND[n], mean_D, balance_D, linear_D, balanced_D)
        reach_1[0] = _reach(balanced_D.view(np.int32))
        step = _step(square, reach_1.view(np.float32)[0], width, levels, longest)
        _, weighted, _ = _rounded(balanced_D, np.float32(1.0) / step, levels, own_D, other_D, whole_D)
        about_N3[n, 0], about_N3[n, 1] = step, weighted + both
        about_N3[n, 2] = length_of(square, reach_1.view(np.float32)[0], width)
        if longest > np.float32(0.0):
            word_NF[n, :width] = whole_D
        elif has_parts:
            _, more, _ = _write_parts(whole_D, shift_2D[0], shift_2D[1], zero, row_NE[n])
            about_N3[n, 1] = (about_N3[n, 1] + more) / np.float32(FINE)
        else:
            for d in range(width):
                row_NE[n, d] = np.int8(np.int32(whole_D[d]) + zero)


@compiled(fastmath=ANY_ORDER)
def _copied(x_D: Any, mean_D: Any, balance_D: Any, linear_D: Any, out_D: Any) -> tuple[Any, Any, Any]:
    """Write x. Returns: the squared lengths of ``x * balance`` and ``x - mean``, and the latter's product with
    ``linear``.
    """
    balanced, square, linear = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for d in range(len(x_D)):
        key = as_float(x_D[d])
        x, y = key - mean_D[d], key * balance_D[d]
        out_D[d] = key
        balanced += y * y
        square += x * x
        linear += x * linear_D[d]
    return balanced, square, linear


@compiled(*(f"({keys}[:,::1], f4[:,::1], b1, b1, f4[:,::1], f4[:,::1])" for keys in KEY_TYPES))
def centre_keys(keys_MD: Any, about_5D: Any, by_distance: bool, keeps_mean: bool, out_MD: Any, about_5M: Any) -> None:
    """Write keys that are multiplied as they are, less their mean, with what :func:`round_keys` says of each.

    Args:
        keeps_mean: leave the mean on the keys.
    """
    width = keys_MD.shape[1]
    balanced_D = np.empty(width, np.float32)
    mean_D, balance_D, linear_D, _, _ = _rows_of(about_5D)
    linear_length, mean_length = _length(linear_D), _length(mean_D * balance_D)
    for m in range(len(keys_MD)):
        if keeps_mean:
            balanced, square, linear = _copied(keys_MD[m], mean_D, balance_D, linear_D, out_MD[m])
            size = np.sqrt(balanced) + mean_length
        else:
            balanced, square, linear = _centred(keys_MD[m], mean_D, balance_D, linear_D, balanced_D)
            for d in range(width):
                out_MD[m, d] = as_float(keys_MD[m, d]) - mean_D[d]
            size = np.sqrt(balanced)
        about_5M[0, m], about_5M[1, m], about_5M[2, m] = 1.0, 0.0, size
        about_5M[3, m], about_5M[4, m] = _bias(square, linear, linear_length, by_distance)

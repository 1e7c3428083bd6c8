"""Compiled loops of the search for memories: best of rows of scores, exact or in 8 bits, and attention.

Import where used: numba takes half a second to load. Ties go to the earlier memory.

Shapes: N queries, M columns of scores (memories of a block), S memories, C groups of memories, K chosen, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.ops.kernels import approx_kth_largest, compiled, dot

GROUPS = 256
"""Scores are looked at in so many groups first."""

_LINE = 16
"""float32 numbers that come from memory at once."""

_HALVINGS = 12

LOWEST = -(1 << 30)
"""Below every product of vectors in 8 bits."""

SHORTEST = 1e-12
"""Shorter queries are zero, as for torch.nn.functional.normalize."""

ANY_ORDER = {"reassoc", "contract", "nsz", "nnan", "ninf"}  # queries and keys are finite here


class BestOfRows(NamedTuple):
    """The best memories of each query so far."""

    raw_NK: Any
    """int32 products in 8 bits."""
    ids_NK: Any
    best_NK: Any


@compiled(fastmath=ANY_ORDER)
def _group_largest(score_M: Any, columns: int, largest_C: Any) -> None:
    """The largest score of each group; column m is in group ``m % C``, so that the loop is over neighbours."""
    groups = len(largest_C)
    largest_C[:] = score_M[:groups]
    for start in range(groups, columns, groups):
        part_C = score_M[start : min(start + groups, columns)]  # a sum as an index would not be vectorized
        for c in range(len(part_C)):
            largest_C[c] = max(largest_C[c], part_C[c])


@compiled()
def _insert(best_K: Any, ids_K: Any, score: Any, number: int) -> Any:
    """Put a score that belongs among the best there; of equal ones the lower number comes first. Returns its place."""
    at = len(best_K) - 1
    while at > 0 and (score > best_K[at - 1] or (score == best_K[at - 1] and number < ids_K[at - 1])):
        best_K[at], ids_K[at] = best_K[at - 1], ids_K[at - 1]
        at -= 1
    best_K[at], ids_K[at] = score, number
    return at


@compiled()
def _belongs(best_K: Any, ids_K: Any, score: Any, number: int) -> Any:
    return score > best_K[-1] or (score == best_K[-1] and number < ids_K[-1])


@compiled("(f4[:,::1], i8, i8, i8[:,::1], f4[:,::1])")
def best_of_rows(score_NM: Any, columns: int, first: int, ids_NK: Any, best_NK: Any) -> None:
    """Merge scores of memories ``first`` and so on into the best of each query, best first.

    A group is looked into when its largest score reaches what k groups' reach, and the k-th best so far: no other
    group can hold one of the k best.
    """
    k = best_NK.shape[1]
    largest_C = np.empty(min(columns, GROUPS), np.float32)
    for n in range(len(best_NK)):
        score_M, best_K, ids_K = score_NM[n], best_NK[n], ids_NK[n]
        _group_largest(score_M, columns, largest_C)
        bound = approx_kth_largest(largest_C, k)
        for c in range(len(largest_C)):
            if largest_C[c] < bound or largest_C[c] < best_K[-1]:
                continue
            for i in range(c, columns, len(largest_C)):
                if score_M[i] >= bound and _belongs(best_K, ids_K, score_M[i], first + i):
                    _insert(best_K, ids_K, score_M[i], first + i)


@compiled("(f4[:,:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,:,::1], i1[:,:,::1], i4[:,::1])", fastmath=ANY_ORDER)
def round_queries(
    query_GND: Any, step_GD: Any, error_G: Any, longest_G: Any, unit_GND: Any, quantized_GND: Any, reach_GN: Any
) -> None:
    """Scale queries to length one, and write them in 8 bits for products with 8-bit keys.

    Args:
        query_GND: finite.
        step_GD: steps of the keys' dimensions.
        error_G, longest_G: length of the largest rounding error of a key, and of the longest rounded key.
        reach_GN: int32, twice how far a product may be off, in the units of the products.
    """
    for g in range(len(query_GND)):
        for n in range(query_GND.shape[1]):
            query_D, unit_D, quantized_D = query_GND[g, n], unit_GND[g, n], quantized_GND[g, n]
            square = np.float32(0.0)
            for d in range(len(query_D)):
                square += query_D[d] * query_D[d]
            scale = np.float32(1.0) / max(np.sqrt(square), np.float32(SHORTEST))
            largest, halves = np.float32(1e-30), np.float32(0.0)
            for d in range(len(query_D)):
                unit_D[d] = query_D[d] * scale
                weight = abs(unit_D[d] * step_GD[g, d])
                largest, halves = max(largest, weight), halves + np.float32(0.5) * weight
            step, left = largest / np.float32(127.0), np.float32(0.0)
            for d in range(len(query_D)):
                weight = unit_D[d] * step_GD[g, d]
                rounded = np.rint(weight / step)
                quantized_D[d] = np.int8(rounded)
                left += (weight - rounded * step) ** 2
            # A key is off by the length of its rounding error, or half a step in each dimension; a query by the length
            # of its own error.
            margin = min(error_G[g], halves) + np.sqrt(left) * longest_G[g] + np.float32(1e-6)
            reach_GN[g, n] = np.int32(min(np.ceil(2 * margin / step), np.float32(-LOWEST // 2)))


@compiled()
def _approx_kth_largest(values_C: Any, k: int) -> Any:
    """A number that at least k values reach, and few more; ``LOWEST`` where there are fewer values."""
    if len(values_C) < k:
        return LOWEST
    least = most = values_C[0]
    for c in range(len(values_C)):
        least, most = min(least, values_C[c]), max(most, values_C[c])
    for _ in range(_HALVINGS):  # counting is vectorized; what a search with comparisons meets cannot be foreseen
        middle = np.int32(least + (most - least) // 2)
        count = np.int32(0)
        for c in range(len(values_C)):
            count += np.int32(values_C[c] >= middle)
        least, most = (middle, most) if count >= k else (least, middle)
    return least


@compiled()
def _reaching(raw_M: Any, columns: int, largest_C: Any, bound: int, group_C: Any, which_J: Any) -> Any:
    """Write which products reach a bound, in any order; returns how many there are."""
    groups = count = 0
    for c in range(len(largest_C)):  # written in any case and kept or not: no branch to be foreseen
        group_C[groups] = c
        groups += np.int64(largest_C[c] >= bound)
    for g in range(groups):
        for i in range(group_C[g], columns, len(largest_C)):
            which_J[count] = i
            count += np.int64(raw_M[i] >= bound)
    return count


@compiled(fastmath=ANY_ORDER)
def _multiply_again(which_J: Any, query_D: Any, key_MD: Any, inverse_M: Any, score_J: Any) -> Any:
    """Write scores of some memories; returns a number without meaning."""
    width, fetched = key_MD.shape[1], np.float32(0.0)
    for j in range(len(which_J)):  # all are on their way from memory before the first is multiplied
        for d in range(0, width, _LINE):
            fetched += key_MD[which_J[j], d]
    for j in range(len(which_J)):
        i = which_J[j]
        score_J[j] = dot(query_D, key_MD[i]) * inverse_M[i]
    return fetched


@compiled("(i4[:,::1], i8, i8, i4[::1], f4[:,::1], f4[:,::1], f4[::1], Tuple((i4[:,::1], i8[:,::1], f4[:,::1])))")
def best_of_quantized_rows(
    raw_NM: Any, columns: int, first: int, reach_N: Any, query_ND: Any, key_MD: Any, inverse_M: Any, best: Any
) -> Any:
    """:func:`best_of_rows` of products in 8 bits: those that may be among the best are multiplied again as they are.

    Args:
        raw_NM: int32 products of rounded vectors.
        reach_N: int32, twice how far such a product may be off, up to a constant of each query.
        best: ``BestOfRows`` of the blocks so far, as a plain tuple, which numba recognises faster.
    Returns: a number without meaning, so that no read is optimised away.
    """
    raw_NK, ids_NK, best_NK = best
    k, fetched = best_NK.shape[1], np.float32(0.0)
    largest_C, group_C = np.empty(min(columns, GROUPS), np.int32), np.empty(GROUPS, np.int64)
    which_J, score_J = np.empty(columns, np.int64), np.empty(columns, np.float32)
    for n in range(len(best_NK)):
        raw_M, raw_K, best_K, ids_K = raw_NM[n], raw_NK[n], best_NK[n], ids_NK[n]
        _group_largest(raw_M, columns, largest_C)
        # Of many that are wanted, several are in a group.
        reached = (
            _approx_kth_largest(largest_C, k) if 4 * k <= len(largest_C) else _approx_kth_largest(raw_M[:columns], k)
        )
        # k products of this block reach that. What is below the k-th best so far by more than products may be off is
        # no nearer.
        bound = max(reached, raw_K[-1], LOWEST + reach_N[n]) - reach_N[n]
        count = _reaching(raw_M, columns, largest_C, bound, group_C, which_J)
        fetched += _multiply_again(which_J[:count], query_ND[n], key_MD, inverse_M, score_J)
        for j in range(count):
            score, number = score_J[j], first + which_J[j]
            if _belongs(best_K, ids_K, score, number):
                at = _insert(best_K, ids_K, score, number)
                for i in range(k - 1, at, -1):
                    raw_K[i] = raw_K[i - 1]
                raw_K[at] = raw_M[which_J[j]]
    return fetched


@compiled("(i4[:,:,::1], i4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], i8[:,:,::1], f4[:,:,::1])")
def best_of_quantized_heads(
    raw_GNM: Any, reach_GN: Any, query_GND: Any, key_GMD: Any, inverse_GM: Any, ids_GNK: Any, best_GNK: Any
) -> None:
    """:func:`best_of_quantized_rows` of all heads, with all their memories: one call costs less than many."""
    raw_NK = np.empty(ids_GNK.shape[1:], np.int32)
    for g in range(len(raw_GNM)):
        raw_NK[:] = LOWEST
        best = (raw_NK, ids_GNK[g], best_GNK[g])
        best_of_quantized_rows(
            raw_GNM[g], raw_GNM.shape[2], 0, reach_GN[g], query_GND[g], key_GMD[g], inverse_GM[g], best
        )


@compiled(fastmath=ANY_ORDER)
def _add_weighted(out_D: Any, weight: Any, value_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] += weight * value_D[d]


@compiled("(f4[:,:,::1], i8[:,:,::1], f4[:,:,::1], f4[:,:,::1], f8, f4[:,:,::1], f4[:,:,::1], f4[:,::1], i8, i8)")
def attend_to_selected(
    query_NTD: Any, ids_NTK: Any, key_GSD: Any, value_GSD: Any, scale: float, score_NTK: Any, out_NTD: Any,
    norm_NT: Any, first: int, past: int,
) -> None:  # fmt: skip
    """Attention over chosen memories for N heads (of any rows), head n reading from key-value head ``n * G // N``.

    Args:
        score_NTK: holds what is added to each score, -inf where a memory is dropped, and gets the scores.
        first, past: queries T that are wanted; slices of the arrays would be of other types, and compiled once more.
    """
    heads_each = len(query_NTD) // len(key_GSD)
    for n in range(len(query_NTD)):
        key_SD, value_SD = key_GSD[n // heads_each], value_GSD[n // heads_each]
        for t in range(first, past):
            score_K, ids_K, query_D = score_NTK[n, t], ids_NTK[n, t], query_NTD[n, t]
            largest = np.float32(-np.inf)
            for i in range(len(score_K)):
                if score_K[i] > -np.inf:
                    score_K[i] += dot(query_D, key_SD[ids_K[i]]) * np.float32(scale)
                    largest = max(largest, score_K[i])
            total, out_D = np.float32(0.0), out_NTD[n, t]
            out_D[:] = 0.0
            if largest == -np.inf:
                norm_NT[n, t] = -np.inf
                continue
            for i in range(len(score_K)):
                if score_K[i] > -np.inf:
                    weight = np.exp(score_K[i] - largest)
                    total += weight
                    _add_weighted(out_D, weight, value_SD[ids_K[i]])
            out_D /= total
            norm_NT[n, t] = largest + np.log(total)


@compiled(
    "(i4[:,:,::1], i4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,:,::1], f8, f8, "
    "i8[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1])",
)
def attend_to_few(
    raw_GNM: Any, reach_GN: Any, unit_GND: Any, query_GND: Any, key_GSD: Any, inverse_GS: Any, value_GSD: Any,
    scale: float, threshold: float, ids_GNK: Any, best_GNK: Any, score_GNK: Any, out_GND: Any, norm_GN: Any,
) -> None:  # fmt: skip
    """:func:`best_of_quantized_heads`, then :func:`attend_to_selected` of those more similar than ``threshold``."""
    ids_GNK[:] = -1
    best_GNK[:] = -np.inf
    best_of_quantized_heads(raw_GNM, reach_GN, unit_GND, key_GSD, inverse_GS, ids_GNK, best_GNK)
    for g in range(len(ids_GNK)):
        for n in range(ids_GNK.shape[1]):
            for i in range(ids_GNK.shape[2]):
                stays = ids_GNK[g, n, i] >= 0 and best_GNK[g, n, i] > threshold
                score_GNK[g, n, i] = np.float32(0.0) if stays else np.float32(-np.inf)
    count = query_GND.shape[1]
    attend_to_selected(query_GND, ids_GNK, key_GSD, value_GSD, scale, score_GNK, out_GND, norm_GN, 0, count)

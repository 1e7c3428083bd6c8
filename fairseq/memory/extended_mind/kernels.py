"""Compiled loops of the search for memories: best of a row of scores, and the scan of few queries over 8-bit keys.

Import where used: numba takes half a second to load. Ties go to the earlier memory.

Shapes: N queries, M columns of scores (memories of a block), S memories, C chunks of memories, K chosen, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.kernels import _compiled as compiled

CHUNK = 64
"""Memories whose scores are passed over at once; the layout of 8-bit keys is by so many."""

LOWEST = -(1 << 30)
"""Below every product of vectors in 8 bits."""

_ANY_ORDER = {"reassoc", "contract", "nsz", "nnan", "ninf"}  # queries and keys are finite here
_DOWN = 8  # dimensions that are added up before the sums are stored


@compiled(fastmath=_ANY_ORDER)
def _largest(scores: Any, start: int, stop: int) -> Any:
    best = scores[start]
    for i in range(start + 1, stop):
        best = max(best, scores[i])
    return best


@compiled()
def _insert(best_K: Any, ids_K: Any, score: Any, number: int) -> None:
    """Put a score that belongs among the best there, behind its equals."""
    at = len(best_K) - 1
    while at > 0 and score > best_K[at - 1]:
        best_K[at], ids_K[at] = best_K[at - 1], ids_K[at - 1]
        at -= 1
    best_K[at], ids_K[at] = score, number


@compiled()
def _kth_largest(values: Any, count: int, best_K: Any, ids_K: Any) -> Any:
    """The k-th largest of the first values; -inf when there are fewer."""
    best_K[:] = -np.inf
    for i in range(count):
        if values[i] > best_K[-1]:
            _insert(best_K, ids_K, values[i], i)
    return best_K[-1]


@compiled()
def best_of_rows(score_NM: Any, columns: int, first: int, ids_NK: Any, best_NK: Any) -> None:
    """Merge scores of memories ``first`` and so on into the best of each query, best first.

    A chunk is looked into when its largest score is among the k largest chunks' and reaches the k-th best so far:
    no other chunk can hold one of the k best.
    """
    chunks = (columns + CHUNK - 1) // CHUNK
    k = best_NK.shape[1]
    largest_C = np.empty(chunks, np.float32)
    low_K, unused_K = np.empty(k, np.float32), np.empty(k, np.int64)
    for n in range(len(best_NK)):
        score_M, best_K, ids_K = score_NM[n], best_NK[n], ids_NK[n]
        for c in range(chunks):
            largest_C[c] = _largest(score_M, c * CHUNK, min((c + 1) * CHUNK, columns))
        bound = _kth_largest(largest_C, chunks, low_K, unused_K)
        for c in range(chunks):
            if largest_C[c] >= bound and largest_C[c] > best_K[-1]:
                for i in range(c * CHUNK, min((c + 1) * CHUNK, columns)):
                    if score_M[i] >= bound and score_M[i] > best_K[-1]:
                        _insert(best_K, ids_K, score_M[i], first + i)


@compiled()
def _raise_largest(raw_M: Any, columns: int, largest_C: Any, low_K: Any, unused_K: Any, raw_K: Any) -> None:
    """Write each chunk's largest product, and merge products into the k largest so far."""
    low_K[:] = LOWEST
    for c in range(len(largest_C)):
        largest_C[c] = _largest(raw_M, c * CHUNK, min((c + 1) * CHUNK, columns))
        if largest_C[c] > low_K[-1]:
            _insert(low_K, unused_K, largest_C[c], c)
    bound = low_K[-1]
    for c in range(len(largest_C)):
        if largest_C[c] >= bound and largest_C[c] > raw_K[-1]:
            for i in range(c * CHUNK, min((c + 1) * CHUNK, columns)):
                if raw_M[i] >= bound and raw_M[i] > raw_K[-1]:
                    _insert(raw_K, unused_K, raw_M[i], i)


@compiled()
def best_of_low_rows(
    raw_NM: Any, columns: int, first: int, reach_N: Any, query_ND: Any, key_MD: Any, inverse_M: Any, raw_NK: Any,
    ids_NK: Any, best_NK: Any,
) -> None:  # fmt: skip
    """:func:`best_of_rows` of products in 8 bits: those that may be among the best are multiplied again as they are.

    Args:
        raw_NM: int32 products of rounded vectors.
        reach_N: int32, twice how far such a product may be off, up to a constant of each query.
        raw_NK: int32, the largest products of the blocks so far.
    """
    k, width = best_NK.shape[1], key_MD.shape[1]
    largest_C = np.empty((columns + CHUNK - 1) // CHUNK, np.int32)
    low_K, unused_K = np.empty(k, np.int32), np.empty(k, np.int64)
    for n in range(len(best_NK)):
        raw_M, raw_K, best_K, ids_K = raw_NM[n], raw_NK[n], best_NK[n], ids_NK[n]
        _raise_largest(raw_M, columns, largest_C, low_K, unused_K, raw_K)
        bound = max(raw_K[-1], LOWEST + reach_N[n]) - reach_N[n]
        for c in range(len(largest_C)):
            if largest_C[c] < bound:
                continue
            for i in range(c * CHUNK, min((c + 1) * CHUNK, columns)):
                if raw_M[i] >= bound:
                    score = _product(query_ND[n], key_MD[i], width) * inverse_M[i]
                    if score > best_K[-1]:
                        _insert(best_K, ids_K, score, first + i)


@compiled(fastmath=_ANY_ORDER)
def _rough(query_D: Any, low_DM: Any, out_M: Any) -> None:
    """Products of a query with a chunk of 8-bit keys."""
    out_M[:] = 0.0
    for d in range(0, len(query_D), _DOWN):
        a, b, c, e = query_D[d], query_D[d + 1], query_D[d + 2], query_D[d + 3]
        f, g, h, j = query_D[d + 4], query_D[d + 5], query_D[d + 6], query_D[d + 7]
        for i in range(CHUNK):
            out_M[i] += (
                (a * low_DM[d, i] + b * low_DM[d + 1, i]) + (c * low_DM[d + 2, i] + e * low_DM[d + 3, i])
                + (f * low_DM[d + 4, i] + g * low_DM[d + 5, i]) + (h * low_DM[d + 6, i] + j * low_DM[d + 7, i])
            )  # fmt: skip


@compiled(fastmath=_ANY_ORDER)
def _product(a_D: Any, b_D: Any, width: int) -> Any:
    total = np.float32(0.0)
    for d in range(width):
        total += a_D[d] * b_D[d]
    return total


@compiled()
def best_of_low(
    query_ND: Any, weight_ND: Any, margin_N: Any, low_CDM: Any, key_SD: Any, inverse_S: Any, ids_NK: Any, best_NK: Any
) -> None:
    """The k memories nearest to each of few queries, by 8-bit keys first and the keys themselves where it may matter.

    Args:
        query_ND: of length one.
        weight_ND: the queries times the steps of 8-bit keys, filled up with zeros to the width of ``low_CDM``.
        margin_N: how far a product with 8-bit keys may be off, up to a constant of each query.
        low_CDM: int8, chunks of ``CHUNK`` keys each, dimension by dimension.
        key_SD, inverse_S: keys as they are, and what makes their lengths one.
    """
    chunks, count, width, k = len(low_CDM), len(key_SD), key_SD.shape[1], best_NK.shape[1]
    rough_F = np.empty(chunks * CHUNK, np.float32)
    largest_C = np.empty(chunks, np.float32)
    low_K, unused_K = np.empty(k, np.float32), np.empty(k, np.int64)
    for n in range(len(query_ND)):
        for c in range(chunks):
            rough_M = rough_F[c * CHUNK : (c + 1) * CHUNK]
            _rough(weight_ND[n], low_CDM[c], rough_M)
            largest_C[c] = _largest(rough_M, 0, min(CHUNK, count - c * CHUNK))
        bound = _kth_largest(largest_C, chunks, low_K, unused_K)
        # At least k memories reach the bound; now the k-th best of all of them, roughly.
        low_K[:] = -np.inf
        for c in range(chunks):
            if largest_C[c] >= bound:
                for i in range(c * CHUNK, min((c + 1) * CHUNK, count)):
                    if rough_F[i] >= bound and rough_F[i] > low_K[-1]:
                        _insert(low_K, unused_K, rough_F[i], i)
        bound = low_K[-1] - 2 * margin_N[n]
        best_K, ids_K = best_NK[n], ids_NK[n]
        for c in range(chunks):
            if largest_C[c] < bound:
                continue
            for i in range(c * CHUNK, min((c + 1) * CHUNK, count)):
                if rough_F[i] >= bound:
                    score = _product(query_ND[n], key_SD[i], width) * inverse_S[i]
                    if score > best_K[-1]:
                        _insert(best_K, ids_K, score, i)


@compiled(fastmath=_ANY_ORDER)
def _add_weighted(out_D: Any, weight: Any, value_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] += weight * value_D[d]


@compiled()
def attend_to_chosen(
    query_NTD: Any, ids_NTK: Any, key_GSD: Any, value_GSD: Any, scale: float, score_NTK: Any, out_NTD: Any, norm_NT: Any
) -> None:
    """Attention over chosen memories for N heads (of any rows), head n reading from key-value head ``n * G // N``.

    ``score_NTK`` holds what is added to each score, -inf where a memory is left out, and gets the scores.
    """
    width, heads_each = query_NTD.shape[2], len(query_NTD) // len(key_GSD)
    for n in range(len(query_NTD)):
        key_SD, value_SD = key_GSD[n // heads_each], value_GSD[n // heads_each]
        for t in range(query_NTD.shape[1]):
            score_K, ids_K, query_D = score_NTK[n, t], ids_NTK[n, t], query_NTD[n, t]
            largest = np.float32(-np.inf)
            for i in range(len(score_K)):
                if score_K[i] > -np.inf:
                    score_K[i] += _product(query_D, key_SD[ids_K[i]], width) * np.float32(scale)
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

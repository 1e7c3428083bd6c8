"""Compiled loops over the candidates of a search: taking them in by their bounds, and dropping what has become too far.

Import where used: numba takes half a second to load.

Shapes: M columns of scores (keys), N queries, C candidates a query may hold, K neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.candidates.append_kernels import append_vectors, keep_vectors, num_bits, packs_vectors
from fairseq.memory.index.ops.kernels import GROUP, approx_kth_largest, compiled, kth_largest
from fairseq.memory.index.ops.rounding_kernels import bounds
from fairseq.memory.index.ops.tile_product_kernels import lowest_bit

_PACKS_VECTORS = packs_vectors()
_FEW = 4
"""So many keys of a tile take less time one by one than as vectors."""
_PACKED = 16  # candidates that are dropped or kept at a time


@compiled()
def prune(lower_C: Any, ids_C: Any, filled: int, k: int, threshold: float, width: float) -> tuple[int, float]:
    """Drop candidates that cannot be among the k best. Returns: how many are left, and the risen threshold."""
    threshold = max(threshold, approx_kth_largest(lower_C[:filled], k))
    return _kept_from(lower_C, ids_C, filled, np.float32(threshold - width)), threshold


@compiled(forceinline=True)
def _kept_from(score_C: Any, ids_C: Any, filled: int, lowest: Any) -> int:
    """Keep the candidates whose numbers reach the lowest, in place. Returns: how many these are."""
    if _PACKS_VECTORS and filled + _PACKED <= len(score_C):
        vectors: int = keep_vectors(score_C, ids_C, filled, lowest)
        return vectors
    kept = 0
    for i in range(filled):
        score_C[kept], ids_C[kept] = score_C[i], ids_C[i]
        kept += score_C[i] >= lowest
    return kept


@compiled()
def _last_of_equals(score_C: Any, ids_C: Any, filled: int, k: int, edge: Any) -> Any:
    """The id up to which those whose score is the k-th best, ``edge``, are among the k best."""
    missing = k
    for i in range(filled):
        missing -= score_C[i] > edge
    return np.sort(ids_C[:filled][score_C[:filled] == edge])[missing - 1]


@compiled()
def keep_best(score_C: Any, ids_C: Any, filled: int, k: int) -> int:
    """Keep the k best scored candidates in place, in no order; of equals those with the lowest ids. Returns: how many.

    A score of NaN is none.
    """
    edge = kth_largest(score_C[:filled], k)
    filled = _kept_from(score_C, ids_C, filled, edge)
    if filled <= k:
        return filled
    last, kept = _last_of_equals(score_C, ids_C, filled, k, edge), 0
    for i in range(filled):
        score_C[kept], ids_C[kept] = score_C[i], ids_C[i]
        kept += score_C[i] > edge or ids_C[i] <= last
    return kept


# Arrays are handed over one by one: those of a tuple would be counted in and out of use, which takes longer than the
# rest of it.
@compiled(forceinline=True)
def append_hits(
    raw_X: Any, hits: int, step_M: Any, weight_M: Any, size_M: Any, bias_M: Any, slack_M: Any, key: int,
    first_row: int, scale: Any, zero: Any, width: Any, share: Any, slack: Any, n: int, lower_NC: Any, ids_NC: Any,
    filled_N: Any, width_N: Any,
) -> None:  # fmt: skip
    """Put the keys of a tile that may be among the k best (bits of ``hits``) after the candidates of a query.

    There must be room for a whole tile.

    Args:
        scale, zero, width: of the query, see ``bounded_scores``.
        share: added to all bounds.
        slack: half of how far the share may be off.
    """
    append_expected(
        raw_X, hits, step_M, weight_M, size_M, bias_M, slack_M, key, first_row, scale, zero, width, share, slack,
        np.float32(1.0), n, lower_NC, ids_NC, filled_N, width_N,
    )  # fmt: skip


@compiled(forceinline=True)
def append_expected(
    raw_X: Any, hits: int, step_M: Any, weight_M: Any, size_M: Any, bias_M: Any, slack_M: Any, key: int,
    first_row: int, scale: Any, zero: Any, width: Any, share: Any, slack: Any, part: Any, n: int, lower_NC: Any,
    ids_NC: Any, filled_N: Any, width_N: Any,
) -> None:  # fmt: skip
    """:func:`append_hits` by what scores are expected to be: upper bounds less a part of the gap to the lower ones."""
    if _PACKS_VECTORS and num_bits(hits) > _FEW:
        query = (zero, scale, width, share, slack, part)
        filled_N[n], width_N[n] = append_vectors(
            raw_X, hits, step_M, weight_M, size_M, bias_M, slack_M, key, first_row, query, lower_NC, ids_NC, n,
            filled_N[n], width_N[n],
        )  # fmt: skip
        return
    # Numbers without a sign: otherwise each would be looked at for places counted from the end.
    row, filled, widest = np.uint64(n), np.uint64(filled_N[n]), width_N[n]
    while hits:
        j = np.uint64(lowest_bit(hits))
        hits &= hits - 1
        m = np.uint64(key) + j
        about = (size_M[m], width, bias_M[m], slack_M[m] + slack)
        bound, below = bounds(raw_X[j], zero, step_M[m], weight_M[m], scale, *about)
        below *= part
        lower_NC[row, filled], ids_NC[row, filled] = (bound - below) + (share + slack), first_row + np.int64(m)
        widest = max(widest, below)
        filled += np.uint64(1)
    filled_N[n], width_N[n] = np.int64(filled), widest


@compiled()
def _drop_below(score_C: Any, ids_C: Any, order_C: Any, filled: int, lowest: Any) -> int:
    kept = 0
    for i in range(filled):
        score_C[kept], ids_C[kept], order_C[kept] = score_C[i], ids_C[i], order_C[i]
        kept += score_C[i] >= lowest
    return kept


@compiled()
def _keep_first(score_C: Any, ids_C: Any, order_C: Any, filled: int, k: int) -> int:
    """Keep the k best candidates; of equals those with the lowest ids."""
    edge = np.partition(score_C[:filled], filled - k)[filled - k]
    last, kept = _last_of_equals(score_C, ids_C, filled, k, edge), 0
    for i in range(filled):
        score_C[kept], ids_C[kept], order_C[kept] = score_C[i], ids_C[i], order_C[i]
        kept += score_C[i] > edge or (score_C[i] == edge and ids_C[i] <= last)
    return kept


@compiled()
def prune_candidates(
    score_C: Any, ids_C: Any, order_C: Any, filled: int, k: int, threshold: Any, doubt: Any, ties_by_id: bool
) -> tuple[int, Any]:
    """Drop scored candidates that cannot be among the k best. Returns: how many are left, and the risen threshold."""
    if filled >= k:
        threshold = max(threshold, approx_kth_largest(score_C[:filled], k))
    filled = _drop_below(score_C, ids_C, order_C, filled, threshold - doubt)
    if ties_by_id and filled > len(score_C) - GROUP:
        filled = _keep_first(score_C, ids_C, order_C, filled, k)
    return filled, threshold

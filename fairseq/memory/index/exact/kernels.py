"""Compiled loops of exact search (``candidates.py``): collecting candidates, pruning them, scoring them in float32.

Import where used: numba takes half a second to load.

Shapes: N or Q queries, M columns of scores (keys), C candidates a query may hold, H pairs, D width, K neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.ops.kernels import GROUP, approx_kth_largest, compiled, dot, neg_sq_l2
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances

_PART = 16


class BoundedCandidates(NamedTuple):
    """The candidates of a group of queries, each with a bound that its score is not below."""

    lower_QC: Any
    ids_QC: Any
    filled_Q: Any
    """Candidates of each query."""
    threshold_Q: Any
    """A score that k keys at least reach; rises."""
    width_Q: Any
    """Largest distance of a score above its lower bound; grows."""


class BlockBounds(NamedTuple):
    """A true score is within ``margin`` of ``scale * raw + shift``."""

    scale: float
    shift_Q: Any
    margin_Q: Any
    integral: bool
    """The raw scores are integers."""


# Types of a call, for ``compiled``.
_BOUNDS = "Tuple((f8, f8[::1], f8[::1], b1))"
_CANDIDATES = "Tuple((f4[:,::1], i8[:,::1], i8[::1], f4[::1], f4[::1]))"


@compiled()
def _raw_threshold(threshold: float, scale: float, shift: float, margin: float, integral: bool) -> Any:
    """The approximate score that every key at the threshold reaches."""
    raw = (threshold - margin - shift) / scale
    if integral:
        return min(max(np.floor(raw), -(2.0**30)), 2.0**30)
    if np.isfinite(raw):
        raw -= abs(raw) * 1e-6
    return raw


@compiled()
def _any_reaches(scores_G: Any, size: int, threshold: Any) -> Any:
    count = np.int32(0)
    for i in range(size):
        count += np.int32(scores_G[i] >= threshold)
    return count > 0


@compiled()
def prune(lower_C: Any, ids_C: Any, filled: int, k: int, threshold: float, width: float) -> tuple[int, float]:
    """Drop candidates that cannot be among the k best. Returns: how many are left, and the risen threshold."""
    threshold = max(threshold, approx_kth_largest(lower_C[:filled], k))
    lowest = threshold - width
    kept = 0
    for i in range(filled):
        lower_C[kept], ids_C[kept] = lower_C[i], ids_C[i]
        kept += lower_C[i] >= lowest
    return kept, threshold


@compiled(
    f"(i4[:,::1], i8, i8, {_BOUNDS}, i8, {_CANDIDATES}, i8, i8)",
    f"(f4[:,::1], i8, i8, {_BOUNDS}, i8, {_CANDIDATES}, i8, i8)",
)
def collect_candidates(
    raw_QM: Any, num_rows: int, first_row: int, bounds: Any, k: int, candidates: Any, query: int, column: int
) -> tuple[int, int]:
    """Put every key of a block that could be among the k best after the candidates of its query.

    Args:
        raw_QM: approximate scores. M is a multiple of GROUP, columns from ``num_rows`` on mean nothing.
        first_row: row number of the first column.
        bounds, candidates: ``BlockBounds`` and ``BoundedCandidates`` as plain tuples, which numba recognises faster.
        query, column: where to begin.
    Returns: where a query's candidates left too little room, to resume there; query Q at the end.
    """
    scale, shift_Q, margin_Q, integral = bounds
    lower_QC, ids_QC, filled_Q, threshold_Q, width_Q = candidates
    raw_F = raw_QM.reshape(-1)
    room = lower_QC.shape[1]
    while query < len(filled_Q):
        shift, margin = shift_Q[query], margin_Q[query]
        width = max(width_Q[query], np.float32(2.0 * margin))
        width_Q[query] = width
        lower_C, ids_C = lower_QC[query], ids_QC[query]
        filled, threshold = filled_Q[query], threshold_Q[query]
        reach = raw_QM.dtype.type(_raw_threshold(threshold, scale, shift, margin, integral))
        base = query * raw_QM.shape[1]
        for start in range(column // GROUP * GROUP, num_rows, GROUP):
            if not _any_reaches(raw_F[base + start :][:GROUP], GROUP, reach):
                continue
            if filled > room - GROUP:
                filled, threshold = prune(lower_C, ids_C, filled, k, threshold, width)
                if filled > min(room - GROUP, 3 * room // 4):
                    filled_Q[query], threshold_Q[query] = filled, threshold
                    return query, start
                reach = raw_QM.dtype.type(_raw_threshold(threshold, scale, shift, margin, integral))
            for part in range(start, min(start + GROUP, num_rows), _PART):
                scores_P = raw_F[base + part :][:_PART]
                if not _any_reaches(scores_P, _PART, reach):
                    continue
                # Without a branch, whose outcome the CPU could not predict.
                for i in range(min(_PART, num_rows - part)):
                    lower_C[filled], ids_C[filled] = scores_P[i] * scale + (shift - margin), first_row + part + i
                    filled += scores_P[i] >= reach
        filled_Q[query], threshold_Q[query] = filled, threshold
        query, column = query + 1, 0
    return query, column


@compiled(f"({_CANDIDATES}, i8)")
def prune_all(candidates: Any, k: int) -> None:
    """:func:`prune` for every query."""
    lower_QC, ids_QC, filled_Q, threshold_Q, width_Q = candidates
    for q in range(len(filled_Q)):
        filled, threshold = prune(lower_QC[q], ids_QC[q], filled_Q[q], k, threshold_Q[q], width_Q[q])
        filled_Q[q], threshold_Q[q] = filled, threshold


@compiled("(f4[:,::1], i8[::1], f4[:,::1], i8[::1], b1, f4[::1])")
def score_pairs(query_ND: Any, row_H: Any, keys_MD: Any, col_H: Any, by_distance: bool, out_H: Any) -> None:
    """Inner product, or minus the squared distance, of H pairs of a query and a key."""
    for i in range(len(row_H)):
        query_D, key_D = query_ND[row_H[i]], keys_MD[col_H[i]]
        out_H[i] = neg_sq_l2(query_D, key_D) if by_distance else dot(query_D, key_D)


@compiled(f"(f4[:,::1], f4[:,::1], i8, b1, f4[::1], {_CANDIDATES}, f4[:,::1])")
def score_candidates(
    query_QD: Any, keys_MD: Any, first_row: int, by_distance: bool, bound_Q: Any, candidates: Any, true_QC: Any
) -> None:
    """Score the candidates whose rows are among ``keys_MD``, which start at ``first_row``; ids rise along a query.

    Only those whose low bound reaches ``bound_Q`` and that have no score yet (NaN) are scored.
    """
    lower_QC, ids_QC, filled_Q, _, _ = candidates
    # Four at a time: keys come from far, and four streams of them hide the waiting. The last four may be fewer, with
    # one of them repeated.
    four = np.empty(4, np.int64)
    for q in range(len(filled_Q)):
        ids_C, query_D = ids_QC[q, : filled_Q[q]], query_QD[q]
        lower_C, true_C, bound = lower_QC[q], true_QC[q], bound_Q[q]
        waiting = 0
        past = np.searchsorted(ids_C, first_row + len(keys_MD))
        for i in range(np.searchsorted(ids_C, first_row), past + 1):
            if i < past:
                if lower_C[i] < bound or not np.isnan(true_C[i]):
                    continue
                four[waiting] = i
                waiting += 1
                if waiting < 4:
                    continue
            if waiting:
                four[waiting:] = four[0]
                keys = (ids_C[four[0]], ids_C[four[1]], ids_C[four[2]], ids_C[four[3]])
                a_D, b_D = keys_MD[keys[0] - first_row], keys_MD[keys[1] - first_row]
                c_D, d_D = keys_MD[keys[2] - first_row], keys_MD[keys[3] - first_row]
                keys_4 = (a_D, b_D, c_D, d_D)
                scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
                for j in range(4):
                    true_C[four[j]] = -scores_4[j] if by_distance else scores_4[j]
                waiting = 0


@compiled("(f4[:,::1], i8[::1], i8, f4[::1])")
def reached_by(lower_QC: Any, filled_Q: Any, k: int, out_Q: Any) -> None:
    """A number that at least k of each row's first ``filled`` entries reach, and few more; NaN reaches nothing."""
    for q in range(len(filled_Q)):
        row_C = lower_QC[q, : filled_Q[q]]
        out_Q[q] = approx_kth_largest(row_C[~np.isnan(row_C)], k)

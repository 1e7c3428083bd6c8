"""The compiled loop of searches that see each key once (``streamed.py``).

Import where used: numba takes half a second to load.

Shapes: Q queries of a group, M keys of a block, C candidates, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.candidates.kernels import prune_candidates
from fairseq.memory.index.ops.kernels import GROUP, KEY_TYPES, compiled
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances


class ScoredCandidates(NamedTuple):
    """The best keys so far of a group of queries; rows rise along a query."""

    score_QC: Any
    """float32, the metric's."""
    ids_QC: Any
    filled_Q: Any
    """Candidates of each query."""
    threshold_Q: Any
    """A score that k keys at least reach; rises."""


@compiled(
    *(
        f"(f4[:,::1], {keys}[:,::1], i8, b1, i8, Tuple((f4[:,::1], i8[:,::1], i8[::1], f4[::1], f4[::1])), "
        "Tuple((f4[:,::1], i8[:,::1], i8[::1], f4[::1])))"
        for keys in KEY_TYPES
    )
)
def score_collected(
    query_QD: Any, keys_MD: Any, first_row: int, by_distance: bool, k: int, collected: Any, scored: Any
) -> int:
    """Score what was collected of a block, and keep what may be among the k best.

    Args:
        first_row: row of the first of ``keys_MD``.
        collected: ``BoundedCandidates`` as a plain tuple; left empty.
        scored: ``ScoredCandidates`` as a plain tuple.
    Returns: number of queries whose threshold rose.
    """
    _, row_QC, count_Q, _, _ = collected
    score_QC, ids_QC, filled_Q, threshold_Q = scored
    room, risen = score_QC.shape[1], 0
    # Four at a time, as ``score_candidates`` does; the last four may be fewer, with one of them repeated.
    four = np.empty(4, np.int64)
    for q in range(len(count_Q)):
        row_C, count, query_D = row_QC[q], count_Q[q], query_QD[q]
        score_C, ids_C, filled, threshold = score_QC[q], ids_QC[q], filled_Q[q], threshold_Q[q]
        for start in range(0, count, 4):
            if filled > room - GROUP:
                filled, threshold = prune_candidates(score_C, ids_C, ids_C, filled, k, threshold, np.float32(0.0), True)
            fresh = min(4, count - start)
            for j in range(4):
                four[j] = row_C[start + min(j, fresh - 1)] - first_row
            keys_4 = (keys_MD[four[0]], keys_MD[four[1]], keys_MD[four[2]], keys_MD[four[3]])
            scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
            for j in range(fresh):
                score_C[filled] = -scores_4[j] if by_distance else scores_4[j]
                ids_C[filled] = four[j] + first_row
                filled += not score_C[filled] < threshold  # a NaN stays, as it does in other searches
        if threshold == -np.inf and filled >= k:  # the sooner there is a threshold the fewer keys are scored
            filled, threshold = prune_candidates(score_C, ids_C, ids_C, filled, k, threshold, np.float32(0.0), True)
        risen += threshold > threshold_Q[q]
        filled_Q[q], threshold_Q[q], count_Q[q] = filled, threshold, 0
    return risen

"""The loops of k-means, compiled by numba. Import this module where it is used: numba takes half a second to load.

Shapes: Q keys of a group, C centroids, M columns of scores (C, filled up), D width, N keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import (
    ANY_ORDER,
    FINITE,
    LOWEST,
    NOTHING,
    approx_kth_largest,
    compiled,
    dot,
    neg_sq_l2,
    pack,
)
from fairseq.memory.index.ops.rounding_kernels import bounds

_PART = 64


# Groups are rows of a matrix: a slice would be counted in and out of use.
@compiled(fastmath=FINITE)
def _bound_all(raw_QM: Any, q: int, about_4: Any, about: Any, bound_M: Any) -> Any:
    """Write what scores are at most. Returns: the largest of what they are at least."""
    step_M, weight_M, size_M, bias_M, slack_M = about
    scale, zero, width = about_4[0], about_4[1], about_4[2]
    least = LOWEST
    for m in range(len(bound_M)):
        about_key = (size_M[m], width, bias_M[m], slack_M[m])
        bound_M[m], below = bounds(raw_QM[q, m], zero, step_M[m], weight_M[m], scale, *about_key)
        least = max(least, bound_M[m] - below)
    return least


@compiled(fastmath=FINITE)
def _lower_all(about_4: Any, about: Any, bound_M: Any, lower_M: Any) -> None:
    """Write what scores with these upper bounds are at least."""
    _, _, size_M, _, slack_M = about
    width = about_4[2]
    for m in range(len(bound_M)):
        lower_M[m] = bound_M[m] - np.float32(2.0) * (size_M[m] * width + slack_M[m])


@compiled()
def _count(bound_M: Any, first: int, past: int, reach: Any) -> Any:
    count = np.int32(0)
    for m in range(first, past):
        count += np.int32(bound_M[m] >= reach)
    return count


_ABOUT = "Tuple((f4[::1], f4[::1], f4[::1], f4[::1], f4[::1]))"


@compiled(
    f"(i4[:,::1], f4[:,::1], {_ABOUT}, f4[:,::1], f4[:,::1], i8[::1], b1)",
    f"(f4[:,::1], f4[:,::1], {_ABOUT}, f4[:,::1], f4[:,::1], i8[::1], b1)",
)
def nearest(
    raw_QM: Any, about_Q4: Any, about: Any, keys_QD: Any, centroids_CD: Any, near_Q: Any, by_distance: bool
) -> None:
    """Write the number of each key's nearest centroid.

    Args:
        raw_QM: products; ``about_Q4`` of ``RoundedQueries`` and ``about``, the rows of ``KeyBlock``, bound the scores.
    """
    count = len(centroids_CD)
    bound_M = np.empty(count, np.float32)
    for q in range(len(keys_QD)):
        reach = _bound_all(raw_QM, q, about_Q4[q], about, bound_M)
        best, nearest = np.float32(-np.inf), 0
        only = _count(bound_M, 0, count, reach) == 1
        for start in range(0, count, _PART):
            past = min(start + _PART, count)
            if not _count(bound_M, start, past, reach):
                continue
            for c in range(start, past):
                if bound_M[c] < reach:
                    continue
                if only:
                    nearest = c
                    break
                key_D, centroid_D = keys_QD[q], centroids_CD[c]
                score = neg_sq_l2(key_D, centroid_D) if by_distance else dot(key_D, centroid_D)
                if score > best:
                    best, nearest = score, c
        near_Q[q] = nearest


@compiled(
    f"(i4[:,::1], f4[:,::1], {_ABOUT}, f4[:,::1], f4[:,::1], b1, i8, i8[:,::1])",
    f"(f4[:,::1], f4[:,::1], {_ABOUT}, f4[:,::1], f4[:,::1], b1, i8, i8[:,::1])",
)
def pack_nearest(
    raw_QM: Any, about_Q4: Any, about: Any, keys_QD: Any, centroids_CD: Any, by_distance: bool, wanted: int,
    packed_QC: Any,
) -> int:  # fmt: skip
    """Write each key's ``wanted`` nearest centroids, and few more, as packed neighbours (``ops.kernels.pack``).

    Args:
        raw_QM: as in :func:`nearest`.
        packed_QC: has a place more than there are centroids.
    Returns: how many of the key with most; behind those of others is NOTHING.
    """
    count, most, count_Q = np.uint64(len(centroids_CD)), wanted, np.empty(len(keys_QD), np.int64)
    bound_M, lower_M = np.empty(len(centroids_CD), np.float32), np.empty(len(centroids_CD), np.float32)
    for q in range(len(keys_QD)):
        _bound_all(raw_QM, q, about_Q4[q], about, bound_M)
        _lower_all(about_Q4[q], about, bound_M, lower_M)
        reach, kept, row = approx_kth_largest(lower_M, wanted), np.uint64(0), np.uint64(q)
        for c in range(count):
            packed_QC[row, kept] = np.int64(c)
            kept += np.uint64(bound_M[c] >= reach)
        for at in range(kept):
            c = packed_QC[row, at]
            key_D, centroid_D = keys_QD[q], centroids_CD[np.uint64(c)]
            score = neg_sq_l2(key_D, centroid_D) if by_distance else dot(key_D, centroid_D)
            packed_QC[row, at] = pack(score, c)
        count_Q[q] = np.int64(kept)
        most = max(most, count_Q[q])
    for q in range(len(keys_QD)):
        packed_QC[q, count_Q[q] : most] = NOTHING
    return most


@compiled("(f4[:,::1], i8[::1], i8[::1], f4[:,::1])", fastmath=ANY_ORDER)
def means(keys_ND: Any, order_N: Any, edges: Any, means_CD: Any) -> None:
    """Mean of the keys ``order[edges[c]:edges[c + 1]]`` for each c; zeros for none."""
    for c in range(len(means_CD)):
        mean_D = means_CD[c]
        mean_D[:] = 0.0
        for n in range(edges[c], edges[c + 1]):
            key_D = keys_ND[order_N[n]]
            for d in range(len(key_D)):
                mean_D[d] += key_D[d]
        count = np.float32(max(1, edges[c + 1] - edges[c]))
        for d in range(len(mean_D)):
            mean_D[d] /= count

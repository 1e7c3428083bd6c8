"""The loops of k-means, compiled by numba. Import this module where it is used: numba takes half a second to load.

Shapes: Q keys of a group, C centroids, M columns of scores (C, filled up), D width, N keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import ANY_ORDER, compiled, dot, neg_sq_l2

_PART = 64


@compiled(fastmath={"reassoc", "nsz", "nnan"})
def _largest(raw_C: Any) -> Any:
    largest = raw_C[0]
    for c in range(len(raw_C)):
        largest = max(largest, raw_C[c])
    return largest


@compiled()
def _count(raw_C: Any, reach: Any) -> Any:
    count = np.int32(0)
    for c in range(len(raw_C)):
        count += np.int32(raw_C[c] >= reach)
    return count


@compiled(
    "(i4[:,::1], f4[::1], f4[:,::1], f4[:,::1], i8[::1], b1)",
    "(f4[:,::1], f4[::1], f4[:,::1], f4[:,::1], i8[::1], b1)",
)
def nearest(raw_QM: Any, width_Q: Any, keys_QD: Any, centroids_CD: Any, near_Q: Any, by_distance: bool) -> None:
    """Write the number of each key's nearest centroid.

    Args:
        raw_QM: approximate scores: the best centroid's is within ``width`` of the largest.
    """
    for q in range(len(keys_QD)):
        raw_C = raw_QM[q, : len(centroids_CD)]
        reach = raw_QM.dtype.type(np.floor(float(_largest(raw_C)) - width_Q[q]))
        best, nearest = np.float32(-np.inf), 0
        only = _count(raw_C, reach) == 1
        for start in range(0, len(raw_C), _PART):
            part = raw_C[start : start + _PART]
            if not _count(part, reach):
                continue
            for c in range(len(part)):
                if part[c] < reach:
                    continue
                if only:
                    nearest = start + c
                    break
                key_D, centroid_D = keys_QD[q], centroids_CD[start + c]
                score = neg_sq_l2(key_D, centroid_D) if by_distance else dot(key_D, centroid_D)
                if score > best:
                    best, nearest = score, start + c
        near_Q[q] = nearest


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

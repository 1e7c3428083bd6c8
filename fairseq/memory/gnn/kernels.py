"""The loop of ``attention.py`` over neighbours on a CPU, compiled by numba. Import it where it is used.

Shapes: N tokens, K neighbours, M states, H heads, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled, dot
from fairseq.memory.index.ops.lane_sum_kernels import products


@compiled("(f4[:,:,::1], f4[:,::1], i8[:,::1], b1[:,::1], f4[:,:,::1], f4[:,:,::1])")
def attend_neighbors(
    query_NHD: Any, state_MD: Any, index_NK: Any, keep_NK: Any, weight_NHK: Any, mean_NHD: Any
) -> None:
    """Write each token's weights of its neighbours, and the weighted sum of their states.

    A state is read where it is, twice in a row, instead of being copied beside the token's other neighbours first. A
    token without neighbours gets zeros.
    """
    for n in range(len(query_NHD)):
        for k in range(index_NK.shape[1]):
            if keep_NK[n, k]:
                _write_scores(query_NHD[n], state_MD[index_NK[n, k]], weight_NHK[n], k)
            else:
                weight_NHK[n, :, k] = -np.inf
        for h in range(query_NHD.shape[1]):
            _softmax(weight_NHK[n, h])
        mean_NHD[n] = 0.0
        for k in range(index_NK.shape[1]):
            if keep_NK[n, k]:
                _add_weighted(mean_NHD[n], state_MD[index_NK[n, k]], weight_NHK[n], k)


@compiled()
def _write_scores(query_HD: Any, state_D: Any, weight_HK: Any, k: int) -> None:
    heads = len(query_HD)
    fours = heads - heads % 4
    for h in range(0, fours, 4):  # the state is loaded once for four heads
        score = products(state_D, (query_HD[h], query_HD[h + 1], query_HD[h + 2], query_HD[h + 3]))
        for i in range(4):
            weight_HK[h + i, k] = score[i]
    for h in range(fours, heads):
        weight_HK[h, k] = dot(state_D, query_HD[h])


@compiled()
def _softmax(weight_K: Any) -> None:
    """Softmax of scores, in place; zeros where all are minus infinity."""
    best, total = np.float32(-np.inf), np.float32(0.0)
    for k in range(len(weight_K)):
        best = max(best, weight_K[k])
    if best == -np.inf:
        best = np.float32(0.0)
    for k in range(len(weight_K)):
        weight_K[k] = np.exp(weight_K[k] - best)
        total += weight_K[k]
    if total > 0.0:
        for k in range(len(weight_K)):
            weight_K[k] /= total


@compiled()
def _add_weighted(mean_HD: Any, state_D: Any, weight_HK: Any, k: int) -> None:
    for h in range(len(mean_HD)):
        mean_D, weight = mean_HD[h], weight_HK[h, k]
        for d in range(len(state_D)):
            mean_D[d] += weight * state_D[d]

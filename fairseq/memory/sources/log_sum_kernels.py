"""The loop of ``log_sums.py`` on a CPU, compiled by numba. Import it where it is used.

Shapes: N positions, M candidates, R rows of tokens (N, or 1 that all positions share).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import ANY_ORDER, compiled, largest
from fairseq.memory.sources.float_kernels import exp, float_of


@compiled()
def _largest(score_M: Any) -> Any:
    return float_of(np.uint32(largest(score_M.view(np.int32))))


@compiled(fastmath=ANY_ORDER)
def _shares(score_M: Any, value_M: Any, target: Any, top: Any, lowest: Any) -> Any:
    """Sums of ``exp(score - top)`` over the candidates that hold the target, and over all of them."""
    hit, whole = np.float32(0.0), np.float32(0.0)
    for m in range(len(score_M)):
        x = score_M[m] - top
        share = exp(lowest if x < lowest else x)  # nan stays nan
        whole += share
        hit += share if value_M[m] == target else np.float32(0.0)
    return hit, whole


@compiled()
def _log_add(a: Any, b: Any) -> Any:
    """As ``log_space.log_add``."""
    return a if a == b == -np.inf else max(a, b) + np.log1p(np.exp(-abs(a - b)))


@compiled()
def _add_row(
    score_M: Any, value_M: Any, target: Any, lowest: Any, far: Any, hit_N: Any, whole_N: Any, n: int
) -> None:  # fmt: skip
    """Add the candidates of one position, whose scores are scaled; writes over them."""
    nothing = np.float32(-np.inf)
    top = _largest(score_M)
    if top == nothing and not np.isnan(np.sum(score_M)):
        return
    hit, whole = _shares(score_M, value_M, target, top, lowest)
    whole_N[n] = _log_add(whole_N[n], np.log(whole) + top)
    if hit < far:
        for m in range(len(score_M)):
            score_M[m] = score_M[m] if value_M[m] == target else nothing
        top = _largest(score_M)
        if top == nothing:
            return
        hit, _ = _shares(score_M, value_M, target, top, lowest)
    hit_N[n] = _log_add(hit_N[n], np.log(hit) + top)


@compiled()
def add_scaled(
    score_M: Any, value_M: Any, target: Any, scale: Any, lowest: Any, far: Any, scaled_M: Any, hit_N: Any,
    whole_N: Any, n: int,
) -> None:  # fmt: skip
    """:func:`add_candidates` for the n-th position, whose candidates all count; ``scaled_M`` is room for its scores."""
    for m in range(len(score_M)):
        scaled_M[m] = score_M[m] * scale
    _add_row(scaled_M, value_M, target, lowest, far, hit_N, whole_N, n)


@compiled("(f4[:,::1], b1[:,::1], i4[:,::1], i4[::1], f4, f4, f4, f4[::1], f4[::1])")
def add_candidates(
    scores_NM: Any, keep_NM: Any, value_RM: Any, target_N: Any, scale: Any, lowest: Any, far: Any,
    hit_N: Any, whole_N: Any,
) -> None:  # fmt: skip
    """Add ``exp(scale * score)`` to sums given by their logarithms: of the candidates that hold the target, and of all.

    Args:
        keep_NM: which candidates count; of no rows where all do.
        lowest: what is further below a row's largest score counts as if it were there, and so does what is not kept.
        far: sums of hits below this are taken again, exactly, relative to the largest hit.
    """
    nothing = np.float32(-np.inf)
    score_M = np.empty(scores_NM.shape[1], np.float32)
    for n in range(len(scores_NM)):
        value_M = value_RM[n if len(value_RM) > 1 else 0]
        for m in range(len(score_M)):
            score_M[m] = scores_NM[n, m] * scale
        if len(keep_NM):
            for m in range(len(score_M)):
                score_M[m] = score_M[m] if keep_NM[n, m] else nothing
        _add_row(score_M, value_M, target_N[n], lowest, far, hit_N, whole_N, n)


@compiled(
    "(f4[:,::1], i8[:,::1], i8[::1], i4[::1], f4, f4, f4, f4[::1], f4[::1])",
    "(f4[:,::1], i8[:,::1], i4[::1], i4[::1], f4, f4, f4, f4[::1], f4[::1])",
)
def add_neighbors(
    scores_NK: Any, ids_NK: Any, value_R: Any, target_N: Any, scale: Any, lowest: Any, far: Any, hit_N: Any,
    whole_N: Any,
) -> None:  # fmt: skip
    """As :func:`add_candidates`, of rows whose tokens are looked up; a row of -1 is none."""
    count = scores_NK.shape[1]
    score_K, value_K = np.empty(count, np.float32), np.empty(count, np.int32)
    for n in range(len(scores_NK)):
        for k in range(count):
            row, score = ids_NK[n, k], scores_NK[n, k] * scale
            score_K[k] = score if row >= 0 else np.float32(-np.inf)
            value_K[k] = value_R[np.uint64(max(row, 0))]
        _add_row(score_K, value_K, target_N[n], lowest, far, hit_N, whole_N, n)

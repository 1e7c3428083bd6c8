"""Loops of the search for many neighbours per query, compiled by numba; see ``wide_search``.

Shapes: Q queries, P lists a query visits, M keys of a list, S scores of a query, C survivors a query may have, K
neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.kernels import _compiled

_EVERY = 16
"""One score of so many is looked at to guess where the k best begin."""


@_compiled()
def put_rows(block_QM: Any, offset_Q: Any, scores: Any) -> None:
    """Copy each row of scores to its place in the flat array."""
    size = block_QM.shape[1]
    for q in range(block_QM.shape[0]):
        start = offset_Q[q]
        for m in range(size):
            scores[start + m] = block_QM[q, m]


@_compiled()
def _guess(scores_S: Any, sample: Any, wanted: int) -> float:
    """A threshold that a few more than ``wanted`` scores probably reach, by a sample."""
    count = 0
    for s in range(0, len(scores_S), _EVERY):
        sample[count] = scores_S[s]
        count += 1
    # Of a sample of one in n, the number that belongs to the best w is off by about sqrt(w / n).
    expected = wanted / _EVERY
    place = int(expected + 3.0 * np.sqrt(expected) + 3.0)
    if place >= count:
        return -np.inf
    return float(np.partition(sample[:count], count - 1 - place)[count - 1 - place])


@_compiled()
def select(scores: Any, edges_Q: Any, wanted: int, order_QC: Any, sample: Any) -> None:
    """Write each query's survivors: at least the ``wanted`` best, if there are so many.

    Each is an integer that is the smaller the better its score; its low half is the place among the query's scores.
    What is not written is the largest integer.
    """
    nothing = np.int64(0x7FFFFFFFFFFFFFFF)
    bits = scores.view(np.int32)
    room = order_QC.shape[1]
    for q in range(len(order_QC)):
        start, stop = edges_Q[q], edges_Q[q + 1]
        threshold = np.float32(_guess(scores[start:stop], sample, wanted))
        count = _num_reaching(scores, start, stop, threshold)
        if count < min(wanted, stop - start) or count > room:  # the sample was unlucky, or many scores are equal
            threshold = _kth_best(scores[start:stop], wanted)
        at = 0
        for strictly in (True, False):  # of equal scores at the threshold there may be more than there is room for
            for s in range(start, stop):
                if at < room and (scores[s] > threshold if strictly else scores[s] == threshold):
                    bit = np.int64(bits[s])
                    if bit < 0:
                        bit ^= 0x7FFFFFFF  # the bits of a negative float, turned round, order as the float does
                    order_QC[q, at] = ((np.int64(-1) - bit) << 32) | (s - start)
                    at += 1
            if at == count:
                break
        order_QC[q, at:] = nothing


@_compiled()
def _num_reaching(scores: Any, start: int, stop: int, threshold: Any) -> int:
    count = 0
    for s in range(start, stop):
        count += scores[s] >= threshold
    return count


@_compiled()
def _kth_best(scores_S: Any, k: int) -> Any:
    """Exact and slow; seldom needed."""
    place = max(0, len(scores_S) - k)
    return np.partition(scores_S, place)[place]


@_compiled()
def look_up(
    order_QC: Any, edges_Q: Any, start_QP: Any, from_QP: Any, ids: Any, scores: Any, ids_QK: Any, scores_QK: Any
) -> None:
    """Turn the first survivors, sorted, into rows of the store and scores.

    Args:
        start_QP: where the scores of each visited list begin among all scores.
        from_QP: where that list's rows begin in ``ids``.
    """
    num_lists = start_QP.shape[1]
    for q in range(len(ids_QK)):
        begin = edges_Q[q]
        for k in range(min(ids_QK.shape[1], edges_Q[q + 1] - begin)):
            place = begin + (order_QC[q, k] & 0xFFFFFFFF)
            low, high = 0, num_lists
            while high - low > 1:
                middle = (low + high) // 2
                if start_QP[q, middle] <= place:
                    low = middle
                else:
                    high = middle
            ids_QK[q, k] = ids[from_QP[q, low] + place - start_QP[q, low]]
            scores_QK[q, k] = scores[place]

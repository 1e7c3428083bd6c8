"""Compiled loops that put equally close keys into an order (``bulk_search.py``).

Import where used: numba takes half a second to load.

Shapes: N queries, C candidates of a query, H queries with ties, K neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled


@compiled("(f4[:,::1], i8[:,::1], i8[:,::1], i8[::1])")
def order_equals(score_NC: Any, ids_NC: Any, order_NC: Any, filled_N: Any) -> None:
    """Bring candidates of equal scores into the order of their ids; the scores are falling already."""
    for n in range(len(filled_N)):
        score_C, ids_C, order_C = score_NC[n], ids_NC[n], order_NC[n]
        first = 0
        while first < filled_N[n]:
            after = first + 1
            while after < filled_N[n] and score_C[after] == score_C[first]:
                after += 1
            if after - first > 1:
                by_id = np.argsort(ids_C[first:after])
                ids_C[first:after] = ids_C[first:after][by_id]
                order_C[first:after] = order_C[first:after][by_id]
            first = after


@compiled("(f4[:,::1], i8[:,::1], i8[:,::1], i8[::1], i8, i8[::1], b1)")
def settle_ties(
    score_NC: Any, ids_NC: Any, order_NC: Any, filled_N: Any, k: int, row_H: Any, by_distance: bool
) -> None:
    """Of candidates that tie for the last places take those that faiss would have kept.

    faiss scans keys one after the other and keeps k of them; one that is as far as the farthest kept is skipped,
    and a closer one takes the place of the farthest: of several it is the one with the highest id where distances are
    compared, with the lowest where products are.

    Args:
        score_NC: candidates of each query, best first, of equals the lowest id first; ``order_NC`` is the order in
            which faiss scans them.
        row_H: queries whose candidates at places k - 1 and k are equal. Those places get the right ids.
    """
    for h in range(len(row_H)):
        score_C, order_C, ids_C = score_NC[row_H[h]], order_NC[row_H[h]], ids_NC[row_H[h]]
        first, after = k - 1, k
        while first > 0 and score_C[first - 1] == score_C[k - 1]:
            first -= 1
        while after < filled_N[row_H[h]] and score_C[after] == score_C[k - 1]:
            after += 1
        tied = np.empty(after - first, np.int64)  # places of those kept; the lower place has the lower id
        kept = better = 0
        for at in np.argsort(order_C[:after]):
            if at < first:
                better += 1
                if kept + better > k:
                    last = 0
                    for j in range(kept):
                        if (tied[j] > tied[last]) == by_distance:
                            last = j
                    tied[last] = tied[kept - 1]
                    kept -= 1
            elif kept + better < k:
                tied[kept] = at
                kept += 1
        kept_places = np.sort(tied[:kept])
        ids_C[first : first + kept] = ids_C[kept_places].copy()

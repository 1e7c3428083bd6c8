"""Compiled loops that choose the k best of scored candidates. Import where used: numba takes half a second to load.

Shapes: N queries, C candidates a query may hold, Q queries of a part, K neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.candidates.kernels import keep_best
from fairseq.memory.index.ops.kernels import NOTHING, approx_kth_largest, compiled, pack

_FEW_MORE = 8


@compiled("(f4[:,::1], i4[:,::1], i8[::1], i8, i8[:,::1], f4[:,::1])")
def take_best(score_NC: Any, row_NC: Any, filled_N: Any, first: int, ids_QK: Any, scores_QK: Any) -> None:
    """Write the best candidates of some queries, which begin at ``first``, in no order; of equals the lowest rows.

    Where there are fewer -1 and minus infinity are written. Candidates lose their places.
    """
    k = ids_QK.shape[1]
    for q in range(len(ids_QK)):
        n = first + q
        kept = keep_best(score_NC[n], row_NC[n], filled_N[n], k)
        for c in range(np.uint64(kept)):
            ids_QK[q, c], scores_QK[q, c] = row_NC[n, c], score_NC[n, c]
        ids_QK[q, kept:], scores_QK[q, kept:] = -1, -np.inf


@compiled("(f4[:,::1], i4[:,::1], i8[::1], i8, i8, i8[:,::1])")
def pack_best(score_NC: Any, row_NC: Any, filled_N: Any, first: int, k: int, packed_QC: Any) -> int:
    """Write the k best candidates of some queries, which begin at ``first``, as packed neighbours, and few more.

    Returns: how many of those with most.
    """
    most, count_Q = 0, np.empty(len(packed_QC), np.int64)
    for q in range(len(packed_QC)):
        n, kept = first + q, np.uint64(0)
        score_C, row_C, packed_C = score_NC[n, : filled_N[n]], row_NC[n], packed_QC[q]
        if filled_N[n] <= k + k // _FEW_MORE:  # to choose among them takes longer than to sort them
            for c in range(len(score_C)):
                packed_C[c] = pack(score_C[c], np.int64(row_C[c]))
            kept = np.uint64(len(score_C))
        else:
            least = approx_kth_largest(score_C, k)
            for c in range(len(score_C)):
                packed_C[kept] = pack(score_C[c], np.int64(row_C[c]))
                kept += np.uint64(not score_C[c] < least)
        count_Q[q] = np.int64(kept)
        most = max(most, count_Q[q])
    for q in range(len(packed_QC)):
        packed_QC[q, count_Q[q] : most] = NOTHING
    return most

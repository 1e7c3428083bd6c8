"""The loop of ``pq_rescoring.py``, compiled by numba. Import it where it is used: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.lists.adc_kernels import share_of_list, sum_four, write_table
from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.vector_kernels import fetch

_AHEAD = 16  # rows, which lie anywhere: a core waits for each as long as it takes to score four
_LINE = 64


@compiled(forceinline=True)
def _fetch_row(code_RS: Any, about_R2: Any, row: int) -> None:
    parts = code_RS.shape[1]
    for first in range(0, parts, _LINE):
        fetch(np.uint64(code_RS.ctypes.data) + np.uint64(row * parts + first))
    fetch(np.uint64(about_R2.ctypes.data) + np.uint64(8 * row))


CODED = "Tuple((u1[:,::1], f4[:,::1], f4[:,::1], f4[:,:,::1]))"
"""Types of ``coded``, for ``compiled``."""


@compiled()
def coded_room(coded: Any) -> Any:
    """Memory of :func:`score_listed`: a table of the codewords' scores, shares of lists, and whose these are."""
    _, _, centroid_LD, words_SEJ = coded
    table_SJ = np.empty((words_SEJ.shape[0], words_SEJ.shape[2]), np.float32)
    return table_SJ, np.empty(len(centroid_LD), np.float32), np.full(len(centroid_LD), -1, np.int64)


@compiled()
def score_listed(
    coded: Any, by_distance: bool, query_ND: Any, n: int, rows_M: Any, count: int, room: Any, out_M: Any
) -> None:
    """Write the scores of the first ``count`` of some rows, none of which is negative, for the n-th query.

    Args:
        coded: as in :func:`score_codes`.
        room: see :func:`coded_room`; of one room every ``n`` is another query.
    """
    code_RS, about_R2, centroid_LD, words_SEJ = coded
    table_SJ, share_L, scored_L = room
    table_F, last = table_SJ.reshape(-1), count - 1
    if count:
        write_table(query_ND[n], words_SEJ, by_distance, table_SJ)
    for c in range(min(_AHEAD, count)):
        _fetch_row(code_RS, about_R2, rows_M[c])
    for first in range(0, count, 4):
        for c in range(first + _AHEAD, min(first + _AHEAD + 4, count)):
            _fetch_row(code_RS, about_R2, rows_M[c])
        r, s = rows_M[first], rows_M[min(first + 1, last)]
        t, u = rows_M[min(first + 2, last)], rows_M[min(first + 3, last)]
        sums = sum_four(table_F, code_RS, r, s, t, u)
        for i in range(min(4, count - first)):
            row = rows_M[first + i]
            number = np.int64(about_R2[row, 1])
            if number < 0:
                out_M[first + i] = -np.inf
                continue
            if scored_L[number] != n:
                scored_L[number] = n
                share_L[number] = share_of_list(query_ND[n], centroid_LD[number], by_distance)
            out_M[first + i] = sums[i] + (about_R2[row, 0] + share_L[number])


@compiled(f"({CODED}, b1, f4[:,::1], i8[:,::1], f4[:,::1])")
def score_codes(coded: Any, by_distance: bool, query_ND: Any, ids_NM: Any, out_NM: Any) -> None:
    """Minus the squared distance, or the inner product, of each query and each of its rows; -inf for a row of -1.

    Args:
        coded: (code_RS, about_R2, centroid_LD, words_SEJ): codes of the rows; what a row adds to the sums of its codes
            for every query, and the number of its list, -1 for none; the centroids of the lists, zeros where keys are
            not less them; and the codewords.
    """
    room, width = coded_room(coded), ids_NM.shape[1]
    rows_M, place_M, score_M = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.float32)
    for n in range(len(ids_NM)):
        count = 0
        for m in range(width):
            out_NM[n, m] = -np.inf
            if ids_NM[n, m] >= 0:
                rows_M[count], place_M[count] = ids_NM[n, m], m
                count += 1
        score_listed(coded, by_distance, query_ND, n, rows_M, count, room, score_M)
        for c in range(count):
            out_NM[n, place_M[c]] = score_M[c]

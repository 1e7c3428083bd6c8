"""The loop of ``pq_rescoring.py``, compiled by numba. Import it where it is used: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.lists.adc_kernels import share_of_list, write_table
from fairseq.memory.index.ops.kernels import compiled


@compiled("(Tuple((u1[:,::1], f4[::1], i4[::1], f4[:,::1], f4[:,:,::1])), b1, f4[:,::1], i8[:,::1], f4[:,::1])")
def score_codes(coded: Any, by_distance: bool, query_ND: Any, ids_NM: Any, out_NM: Any) -> None:
    """Minus the squared distance, or the inner product, of each query and each of its rows; -inf for a row of -1.

    Args:
        coded: (code_RS, bias_R, list_R, centroid_LD, words_SEJ): codes of the rows, what a row adds to the sums of its
            codes for every query, the list of each, -1 for none, the centroids of the lists, zeros where keys are not
            less them, and the codewords.
    """
    code_RS, bias_R, list_R, centroid_LD, words_SEJ = coded
    parts, table_SJ = code_RS.shape[1], np.empty((words_SEJ.shape[0], words_SEJ.shape[2]), np.float32)
    share_L, scored_L = np.empty(len(centroid_LD), np.float32), np.full(len(centroid_LD), -1, np.int64)
    for n in range(len(ids_NM)):
        write_table(query_ND[n], words_SEJ, by_distance, table_SJ)
        for m in range(ids_NM.shape[1]):
            row = ids_NM[n, m]
            if row < 0 or list_R[row] < 0:
                out_NM[n, m] = -np.inf
                continue
            number = list_R[row]
            if scored_L[number] != n:
                scored_L[number] = n
                share_L[number] = share_of_list(query_ND[n], centroid_LD[number], by_distance)
            a = b = c = d = np.float32(0.0)  # each sum would wait for the one before it
            for s in range(0, parts - 3, 4):
                a += table_SJ[s, code_RS[row, s]]
                b += table_SJ[s + 1, code_RS[row, s + 1]]
                c += table_SJ[s + 2, code_RS[row, s + 2]]
                d += table_SJ[s + 3, code_RS[row, s + 3]]
            for s in range(parts // 4 * 4, parts):
                a += table_SJ[s, code_RS[row, s]]
            out_NM[n, m] = (a + b) + (c + d) + (bias_R[row] + share_L[number])

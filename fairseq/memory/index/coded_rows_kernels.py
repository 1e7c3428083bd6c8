"""The loop of ``coded_rows.py``, compiled by numba. Import it where it is used: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.kernels import _ANY_ORDER, _compiled


@_compiled(fastmath=_ANY_ORDER)
def _of_decoded(code_S: Any, words: Any, middle_D: Any, query_D: Any, by_distance: bool, key_D: Any) -> Any:
    width = words.shape[2]
    for s in range(len(code_S)):
        for i in range(width):
            key_D[s * width + i] = words[s, code_S[s], i]
    total = np.float32(0.0)
    if by_distance:
        for d in range(len(key_D)):
            difference = query_D[d] - middle_D[d] - key_D[d]
            total -= difference * difference
    else:
        for d in range(len(key_D)):
            total += query_D[d] * (middle_D[d] + key_D[d])
    return total


@_compiled()
def score_codes(coded: Any, by_distance: bool, query_ND: Any, ids_NM: Any, out_NM: Any) -> None:
    """Minus the squared distance, or the inner product, of each query and each of its rows; -inf for a row of -1.

    Args:
        coded: (code_RS, list_R, middle_LD, words): codes of the rows, the list of each, -1 for none, what a list adds
            to its decoded keys, and the codewords, (S, 256, D / S).
    """
    code_RS, list_R, middle_LD, words = coded
    key_D = np.empty(query_ND.shape[1], np.float32)
    for n in range(len(ids_NM)):
        for m in range(ids_NM.shape[1]):
            row = ids_NM[n, m]
            if row < 0 or list_R[row] < 0:
                out_NM[n, m] = -np.inf
            else:
                middle_D = middle_LD[list_R[row]]
                out_NM[n, m] = _of_decoded(code_RS[row], words, middle_D, query_ND[n], by_distance, key_D)

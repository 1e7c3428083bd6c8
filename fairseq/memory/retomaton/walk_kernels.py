"""RetoMaton's way through given text, compiled by numba. Import this module where it is used.

Shapes: B sequences, N positions of all of them, K neighbours of a search, S searches, P pointers, R rows of the store.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.lists.pq_rescoring_kernels import CODED, coded_room, score_listed
from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.retomaton.kernels import CLUSTERS, follow_one, join_one, slots
from fairseq.memory.sources.log_sum_kernels import add_scaled

_TEXT = "Tuple((i8[::1], i8[::1], f4[:,::1], i8[::1]))"
_FOUND = "Tuple((i8[::1], i8[:,::1], f4[:,::1]))"
_WALK = "({text}, {found}, {coded}, b1, {values}, u1[::1], {clusters}, i8, i8, Tuple((f4, f4, f4)), {sums})"


@compiled(
    *(
        _WALK.format(
            text=_TEXT, found=_FOUND, coded=CODED, values=values, clusters=CLUSTERS, sums="Tuple((f4[::1], f4[::1]))"
        )
        for values in ("i8[::1]", "i4[::1]")
    )
)
def walk(
    text: Any, found: Any, coded: Any, by_distance: bool, value_R: Any, role_R: Any, clusters: Any, min_knns: int,
    max_knns: int, numbers: Any, sums: Any,
) -> int:  # fmt: skip
    """Sum up the candidates of every position of some sequences. Returns: at how many a search was needed.

    Args:
        text: (starts_B, lengths_B, query_ND, token_N): where sequences begin and how long they are, the keys of
            positions, and the tokens that come after them.
        found: (at_N, ids_SK, scores_SK): which search is the position's, and what searches found.
        coded, by_distance: what scores rows, see ``score_codes``.
        value_R, role_R: the token of each row, and what it is to a pointer.
        clusters: as in ``follow``.
        numbers: scale, lowest and far, see ``add_scaled``.
        sums: (hit_N, whole_N): logarithms, to which is added.
    """
    starts_B, lengths_B, query_ND, token_N = text
    at_N, ids_SK, scores_SK = found
    scale, lowest, far = numbers
    hit_N, whole_N = sums
    most = ids_SK.shape[1] + max_knns
    room, slots_H, seen_H, joined_H = coded_room(coded), slots(max_knns), slots(max_knns), slots(most)
    rows_M, values_M = np.empty(most, np.int64), np.empty(most, np.int64)
    scores_M, scaled_M = np.empty(most, np.float32), np.empty(most, np.float32)
    rows_P, scores_P = np.empty(max_knns, np.int64), np.empty(max_knns, np.float32)
    num_searched = 0
    for b in range(len(starts_B)):
        active = 0
        for n in range(starts_B[b], starts_B[b] + lengths_B[b]):
            is_searched = active < min_knns
            num_searched += np.int64(is_searched)
            score_listed(coded, by_distance, query_ND, n, rows_P, active, room, scores_P)
            at = at_N[n] if is_searched else np.int64(-1)
            pointers = (rows_P[:active], scores_P[:active])
            count = join_one(at, ids_SK, scores_SK, *pointers, True, joined_H, rows_M, scores_M)
            for i in range(count):
                values_M[i] = value_R[np.uint64(rows_M[i])]
            own = (rows_M[:count], values_M[:count], scores_M[:count])
            add_scaled(own[2], own[1], token_N[n], scale, lowest, far, scaled_M[:count], hit_N, whole_N, n)
            active, _ = follow_one(*own, token_N[n], role_R, True, clusters, slots_H, seen_H, rows_P)
    return num_searched

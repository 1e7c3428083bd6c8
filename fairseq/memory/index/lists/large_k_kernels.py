"""Compiled loops of searches for many neighbours: choosing among many scores, and neighbours packed into integers.

Scores come in groups of GROUP neighbouring keys of a list, one after the other.

Import where used: numba takes half a second to load.

Shapes: Q queries, P lists a query probes, S groups of all queries one after the other, F keys that were chosen for all
queries, C bounds of a query, K neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.ops.kernels import FINITE, GROUP, LOWEST, NOTHING, approx_kth_largest, compiled

_LOW_HALF = np.int64(0xFFFFFFFF)
_NEVER_BITS = np.int32(np.float32(-np.inf).view(np.int32))
_SEEN = 4  # the lists that hold so many times the wanted keys show well enough where the best begin


class SelectionRoom(NamedTuple):
    """Memory for the bounds of the query with most, and a group more."""

    place_C: Any
    bound_C: Any
    lower_C: Any
    flag_S: Any
    """Groups of that query, and one more."""


SELECTION_ROOM = "Tuple((i8[::1], f4[::1], f4[::1], i8[::1]))"
"""Its types, for ``compiled``."""


@compiled(fastmath=FINITE)
def _certain_threshold(bound_SP: Any, edge_P: Any, gap_P: Any, wanted: int, lower_C: Any) -> Any:
    """A number that the scores of so many keys reach for certain, by the first lists; or one that all reach."""
    count, alive, p, floor = 0, np.int32(0), 0, np.float32(np.inf)
    while p < len(gap_P) and count < _SEEN * wanted:
        gap = gap_P[p]
        for group in range(edge_P[p], edge_P[p + 1]):
            for i in range(GROUP):
                lower = bound_SP[group, i] - gap
                lower_C[count + i] = lower
                is_alive = lower >= LOWEST
                alive += np.int32(is_alive)
                floor = min(floor, lower if is_alive else np.float32(np.inf))
            count += GROUP
        p += 1
    if alive < wanted:
        return LOWEST
    for c in range(count):  # places without a key would spoil the halving of the range
        lower_C[c] = max(lower_C[c], floor)
    return approx_kth_largest(lower_C[:count], wanted)


@compiled()
def _list_group(bound_SP: Any, group: int, reach: Any, place_C: Any, bound_C: Any, count: int) -> int:
    """List the bounds of a group that reach a number; without a branch, whose outcome cannot be foreseen."""
    for i in range(GROUP):
        bound = bound_SP[group, i]
        place_C[count], bound_C[count] = group * GROUP + i, bound
        count += bound >= reach
    return count


@compiled()
def select_candidates(
    bound_SP: Any, most_S: Any, edge_QP: Any, gap_QP: Any, wanted: int, place_F: Any, end_QP: Any, room: Any
) -> None:
    """List the keys of each query that may be among the ``wanted`` best: at least those, if there are so many.

    Args:
        edge_QP: first group of each list, and after the last where they end: P + 1 columns.
        gap_QP: how far scores may be below their bounds.
        place_F: gets the places of the bounds among all, query after query.
        end_QP: gets where the places of each list's keys end.
        room: a ``SelectionRoom`` as a plain tuple (see ``kernels.scan``).
    """
    place_C, bound_C, lower_C, flag_S = room
    kept = 0
    for q in range(len(edge_QP)):
        edge_P, gap_P = edge_QP[q], gap_QP[q]
        reach, count = _certain_threshold(bound_SP, edge_P, gap_P, wanted, lower_C), 0
        for p in range(len(gap_P)):
            flagged, before = 0, count
            for group in range(edge_P[p], edge_P[p + 1]):
                flag_S[flagged] = group
                flagged += most_S[group] >= reach
            for at in range(flagged):
                count = _list_group(bound_SP, flag_S[at], reach, place_C, bound_C, count)
            for c in range(before, count):
                lower_C[c] = bound_C[c] - gap_P[p]
            end_QP[q, p] = count
        # So many scores reach this for certain: keys whose bounds do not are out.
        reach, c = max(reach, approx_kth_largest(lower_C[:count], wanted)), 0
        for p in range(len(gap_P)):
            stop = end_QP[q, p]
            while c < stop:
                place_F[kept] = place_C[c]
                kept += bound_C[c] >= reach
                c += 1
            end_QP[q, p] = kept


@compiled(forceinline=True)
def unpack_row(packed_QC: Any, q: int, columns: int, ids_NK: Any, scores_NK: Any, n: int) -> None:
    """:func:`unpack` for the first columns of one row, into another row."""
    bits_NK, count = scores_NK.view(np.int32), min(ids_NK.shape[1], columns)
    at, to = np.uint64(q), np.uint64(n)
    for c in range(np.uint64(count)):
        packed = packed_QC[at, c]
        bit = np.int32(np.int64(-1) - (packed >> 32))
        bit = bit ^ np.int32(0x7FFFFFFF) if bit < 0 else bit
        is_none = packed == NOTHING
        bits_NK[to, c] = _NEVER_BITS if is_none else bit
        ids_NK[to, c] = np.int64(-1) if is_none else packed & _LOW_HALF
    ids_NK[n, count:] = -1
    scores_NK[n, count:] = -np.inf


@compiled("(i8[:,::1], i8[:,::1], f4[:,::1])", "(i8[:,:], i8[:,::1], f4[:,::1])")
def unpack(packed_QC: Any, ids_QK: Any, scores_QK: Any) -> None:
    """Turn the first packed neighbours, sorted, into ids and scores; -1 and minus infinity where there are fewer."""
    for q in range(len(ids_QK)):
        unpack_row(packed_QC, q, packed_QC.shape[1], ids_QK, scores_QK, q)

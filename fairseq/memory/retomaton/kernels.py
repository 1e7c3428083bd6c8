"""The loops of RetoMaton, compiled by numba. Import this module where it is used: numba takes half a second to load.

Shapes: B sequences, M candidates, P pointers, S searches, K neighbours, R rows of the store, C clusters, H slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled

# What a row is to a pointer.
DELETED = 0
FIRST = 1  # of a document: it follows no row
FOLLOWS = 2


@compiled()
def slots(most: int) -> Any:
    """A hash table for so many numbers."""
    size = 4
    while size < 2 * most:
        size *= 2
    return np.empty(size, np.int64)


@compiled()
def _is_new(slots_H: Any, number: int) -> bool:
    """Put a number into a hash table of a power of two slots, -1 where empty; False where it was there already."""
    mask = len(slots_H) - 1
    at = ((number * np.int64(-7046029254386353131)) >> 29) & mask
    while slots_H[at] != -1:
        if slots_H[at] == number:
            return False
        at = (at + 1) & mask
    slots_H[at] = number
    return True


@compiled()
def _pointers(
    rows_M: Any, values_M: Any, scores_M: Any, token: int, role_R: Any, distinct: bool, slots_H: Any, out_P: Any
) -> tuple[int, int]:
    """Write the successors of the candidates that hold the token, those of the nearest first.

    Returns: how many were written, and how many there are: more only where rows may come twice.
    """
    held = np.flatnonzero((values_M == token) & (rows_M >= 0))
    order = np.argsort(-scores_M[held], kind="mergesort")
    count = reached = 0
    for place in held[order]:
        row = rows_M[place] + 1
        if count == len(out_P) and distinct:
            break
        if row < len(role_R) and role_R[row] == FOLLOWS and (not distinct or _is_new(slots_H, row)):
            reached += 1
            if count < len(out_P):
                out_P[count] = row
                count += 1
    return count, reached


@compiled()
def _extended(
    chosen_U: Any, first_C: Any, member_R: Any, role_R: Any, distinct: bool, slots_H: Any, out_P: Any, count: int
) -> int:
    """Write the members of some clusters after the pointers; returns the number of all."""
    for cluster in chosen_U:
        for j in range(first_C[cluster], first_C[cluster + 1]):
            if count == len(out_P):
                return count
            row = member_R[j]
            if role_R[row] != DELETED and (not distinct or _is_new(slots_H, row)):
                out_P[count] = row
                count += 1
    return count


@compiled()
def _nearest_first(cluster_R: Any, rows_P: Any, seen_H: Any) -> Any:
    """Clusters of the pointers, each once, in the order of the pointers."""
    seen_H[:] = -1
    out_P = np.empty(len(rows_P), np.int64)
    count = 0
    for row in rows_P:
        cluster = cluster_R[row]
        if cluster >= 0 and _is_new(seen_H, cluster):
            out_P[count] = cluster
            count += 1
    return out_P[:count]


@compiled()
def _most_pointers_first(cluster_R: Any, rows_P: Any) -> Any:
    """Clusters of the pointers, each once, those that most pointers lie in first; of equal ones the lower number."""
    sorted_P = np.sort(cluster_R[rows_P])
    cluster_U, num_U = np.empty(len(rows_P), np.int64), np.zeros(len(rows_P), np.int64)
    count = 0
    for cluster in sorted_P:
        if cluster < 0:
            continue
        if count == 0 or cluster_U[count - 1] != cluster:
            cluster_U[count] = cluster
            count += 1
        num_U[count - 1] += 1
    return cluster_U[:count][np.argsort(-num_U[:count], kind="mergesort")]


CLUSTERS = "Tuple((i4[::1], i8[::1], i4[::1]))"


@compiled()
def follow_one(
    rows_M: Any, values_M: Any, scores_M: Any, token: int, role_R: Any, distinct: bool, clusters: Any, slots_H: Any,
    seen_H: Any, out_P: Any,
) -> tuple[int, int]:  # fmt: skip
    """:func:`follow` for one sequence. Returns: how many rows, and how many of them successors alone are.

    Args:
        slots_H, seen_H: room, see ``slots``.
    """
    cluster_R, first_C, member_R = clusters
    slots_H[:] = -1
    count, reached = _pointers(rows_M, values_M, scores_M, token, role_R, distinct, slots_H, out_P)
    if len(member_R) and count < len(out_P):
        rows_P = out_P[:count]
        chosen_U = _nearest_first(cluster_R, rows_P, seen_H) if distinct else _most_pointers_first(cluster_R, rows_P)
        count = _extended(chosen_U, first_C, member_R, role_R, distinct, slots_H, out_P, count)
    return count, reached


@compiled(
    f"(Tuple((i8[:,::1], i8[:,::1], f4[:,::1], i8[::1])), u1[::1], b1, {CLUSTERS}, "
    "Tuple((i8[:,::1], i8[::1], i8[::1])))",
)
def follow(step: Any, role_R: Any, distinct: bool, clusters: Any, followed: Any) -> None:
    """Pointers of each sequence after its token: successors of the candidates that hold it, and their clusters.

    Args:
        step: (rows_BM, values_BM, scores_BM, token_B): the candidates, of which a row of -1 is none, and the tokens.
        role_R: what each row is to a pointer, see above.
        distinct: no row comes twice, and clusters are added in the order of the pointers. Otherwise those that most
            pointers lie in come first, which is the original program's order.
        clusters: (cluster_R, first_C, member_R) as ``Clusters`` has them; empty arrays for none.
        followed: (out_BP, count_B, reached_B): rows, how many, at most P, and how many of them successors alone are.
    """
    out_BP, count_B, reached_B = followed
    rows_BM, values_BM, scores_BM, token_B = step
    slots_H, seen_H = slots(out_BP.shape[1]), slots(out_BP.shape[1])
    for b in range(len(rows_BM)):
        count_B[b], reached_B[b] = follow_one(
            rows_BM[b], values_BM[b], scores_BM[b], token_B[b], role_R, distinct, clusters, slots_H, seen_H, out_BP[b]
        )
        out_BP[b, count_B[b] :] = -1


@compiled()
def join_one(
    at: int, ids_SK: Any, scores_SK: Any, rows_P: Any, scores_P: Any, distinct: bool, slots_H: Any, out_M: Any,
    out_scores_M: Any,
) -> int:  # fmt: skip
    """:func:`join` for one sequence: its search, -1 for none, and its pointers. Returns: how many candidates."""
    count = 0
    must_look = distinct and at >= 0 and len(rows_P) > 0 and rows_P.max() >= 0
    if must_look:
        slots_H[:] = -1
    if at >= 0:
        for i in range(ids_SK.shape[1]):
            if ids_SK[at, i] >= 0:
                out_M[count], out_scores_M[count] = ids_SK[at, i], scores_SK[at, i]
                count += 1
                if must_look:
                    _is_new(slots_H, ids_SK[at, i])
    for i in range(len(rows_P)):
        row = rows_P[i]
        if row >= 0 and (not must_look or _is_new(slots_H, row)):
            out_M[count], out_scores_M[count] = row, scores_P[i]
            count += 1
    return count


_JOIN = (
    "(Tuple((i8[::1], i8[:,::1], f4[:,::1])), Tuple((i8[:,::1], f4[:,::1])), b1, {values}, "
    "Tuple((i8[:,::1], f4[:,::1], i8[:,::1], i8[::1])))"
)


@compiled(*(_JOIN.format(values=each) for each in ("i8[::1]", "i4[::1]")))
def join(found: Any, active: Any, distinct: bool, value_R: Any, joined: Any) -> None:
    """The candidates of each sequence: what its search found, if it was searched, and its pointers.

    Args:
        found: (found_at_B, ids_SK, scores_SK): which search is the sequence's, -1 for none, and what searches found.
        active: (rows_BP, scores_BP): the active pointers, -1 for none.
        distinct: a pointer that the search found too is dropped.
        value_R: the tokens of all rows, or none, and then no tokens are written.
        joined: (rows_BM, scores_BM, values_BM, count_B): rows, -1 for none, their scores and tokens, and how many.
    """
    found_at_B, ids_SK, scores_SK = found
    rows_BP, scores_BP = active
    out_BM, out_scores_BM, values_BM, count_B = joined
    slots_H = slots(out_BM.shape[1])
    for b in range(len(rows_BP)):
        own = (rows_BP[b], scores_BP[b], distinct, slots_H, out_BM[b], out_scores_BM[b])
        count_B[b] = count = join_one(found_at_B[b], ids_SK, scores_SK, *own)
        if len(value_R):
            for i in range(count):
                values_BM[b, i] = value_R[np.uint64(out_BM[b, i])]
        out_BM[b, count:] = -1
        values_BM[b, count:] = -1
        out_scores_BM[b, count:] = -np.inf

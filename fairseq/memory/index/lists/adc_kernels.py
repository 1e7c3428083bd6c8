"""Loops of the search by tables (``adc_search.py``), compiled by numba.

Shapes: M parts of a key, J codewords of a part, E numbers of a codeword, L lists, Q queries, P lists a query probes,
S groups of scores (of GROUP neighbours each) of a query's lists one after the other, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.lists.large_k_kernels import SELECTION_ROOM, select_candidates
from fairseq.memory.index.ops.kernels import ANY_ORDER, GROUP, compiled, dot, largest, neg_sq_l2, pack
from fairseq.memory.index.ops.numba_library import cgutils, numba, types

SIDE_BY_SIDE = 4
"""Keys of :func:`sum_four`."""


def _to_pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


pointer: Any = numba.extending.intrinsic(_to_pointer)
array_at: Any = numba.carray


class ListArrays(NamedTuple):
    """The lists of an index of product-quantized keys."""

    words_MEJ: Any
    """Codewords."""
    centroid_LD: Any
    address_L2: Any
    """Addresses of the codes and of the ids of each list."""
    first_L: Any
    """First bias of each list, L + 1 numbers."""
    bias: Any
    """See ``write_biases``; those of lists that were probed before are written."""


class TableRoom(NamedTuple):
    """Memory for the query with most keys."""

    table_MJ: Any
    score_SP: Any
    most_S: Any
    edge_1P: Any
    end_1P: Any
    place_F: Any


# Types of a call, for ``compiled``.
LISTS = "Tuple((f4[:,:,::1], f4[:,::1], i8[:,::1], i8[::1], f4[::1]))"
ROOM = "Tuple((f4[:,::1], f4[:,::1], f4[::1], i8[:,::1], i8[:,::1], i8[::1]))"


@compiled()
def write_table(query_D: Any, words_MEJ: Any, by_distance: bool, table_MJ: Any) -> None:
    """Write the score that each codeword adds to a key's: its product with the query, for distances twice that."""
    factor = np.float32(2.0) if by_distance else np.float32(1.0)
    parts, width, words = words_MEJ.shape
    for m in range(parts):
        for j in range(words):
            table_MJ[m, j] = 0.0
        for e in range(width):
            weight = query_D[m * width + e] * factor
            for j in range(words):
                table_MJ[m, j] += weight * words_MEJ[m, e, j]


@compiled(forceinline=True)
def sum_four(table_F: Any, code_SM: Any, s: int, t: int, u: int, v: int) -> tuple[Any, Any, Any, Any]:
    """Sums of a table's entries for the codes of four keys, side by side: one would wait for each of its sums."""
    a = b = c = d = np.float32(0.0)
    # Numbers without a sign: others would be looked at for places counted from the end.
    s, t, u, v = np.uint64(s), np.uint64(t), np.uint64(u), np.uint64(v)
    for m in range(np.uint64(code_SM.shape[1])):
        first = m * np.uint64(256)
        a += table_F[first + np.uint64(code_SM[s, m])]
        b += table_F[first + np.uint64(code_SM[t, m])]
        c += table_F[first + np.uint64(code_SM[u, m])]
        d += table_F[first + np.uint64(code_SM[v, m])]
    return a, b, c, d


@compiled()
def _sum_up(table_F: Any, code_SM: Any, score_F: Any, first: int) -> None:
    """Write the sums of a table's entries for the codes of each key."""
    last = len(code_SM) - 1
    for s in range(0, len(code_SM), SIDE_BY_SIDE):
        sums = sum_four(table_F, code_SM, s, min(s + 1, last), min(s + 2, last), min(s + 3, last))
        for i in range(min(SIDE_BY_SIDE, len(code_SM) - s)):
            score_F[first + s + i] = sums[i]


@compiled()
def _add_biases(score_F: Any, first: int, bias_S: Any, share: Any) -> None:
    for i in range(len(bias_S)):
        score_F[first + i] += bias_S[i] + share


@compiled()
def _finish(score_SP: Any, group: int, bias_S: Any, share: Any, most_S: Any) -> int:
    """Make scores of a list's sums, which begin at a group, and find the largest of each group. Returns: the next."""
    score_F, size = score_SP.reshape(-1), len(bias_S)
    first, after = group * GROUP, group + -(-size // GROUP)
    _add_biases(score_F, first, bias_S, share)
    score_F[first + size : after * GROUP] = -np.inf
    bits_SP, most_bits_S = score_SP.view(np.int32), most_S.view(np.int32)
    for at in range(group, after):
        most_bits_S[at] = largest(bits_SP[at])
    return after


@compiled("(f4[::1], f4[:,:,::1], u1[:,::1], i8[::1], u1[::1], b1, f4[:,::1], f4[::1])")
def write_biases(
    centroid_D: Any, words_MEJ: Any, code_SM: Any, id_S: Any, alive: Any, by_distance: bool, table_MJ: Any,
    bias_S: Any,
) -> None:  # fmt: skip
    """Write what is added to the sums of a list's keys, for every query: minus infinity for deleted ones.

    For distances it is ``-|residual|^2 - 2 centroid.residual`` of a key that is a centroid (zero where keys are not
    less them) and a residual. A score is this, the query's share of the list, and the sum of the table's entries for
    the codes.
    """
    parts, width, words = words_MEJ.shape
    for m in range(parts):
        for j in range(words):
            total = np.float32(0.0)
            for e in range(width):
                word = words_MEJ[m, e, j]
                total -= word * (word + np.float32(2.0) * centroid_D[m * width + e])
            table_MJ[m, j] = total
    for i in range(len(bias_S)):
        total = np.float32(0.0)
        if by_distance:
            for m in range(parts):
                total += table_MJ[m, code_SM[i, m]]
        if len(alive) and not alive[id_S[i] >> 3] & (1 << (id_S[i] & 7)):
            total = np.float32(-np.inf)
        bias_S[i] = total


@compiled(f"(i8[::1], {LISTS}, u1[::1], b1, f4[:,::1])")
def prepare_lists(number_L: Any, lists: Any, alive: Any, by_distance: bool, table_MJ: Any) -> None:
    """:func:`write_biases` for some lists; ``lists`` as in :func:`search_tables`."""
    words_MEJ, centroid_LD, address_L2, first_L, bias = lists
    for number in number_L:
        size = first_L[number + 1] - first_L[number]
        if size:
            code_SM = array_at(pointer(address_L2[number, 0]), (size, len(words_MEJ)), np.uint8)
            id_S = array_at(pointer(address_L2[number, 1]), (size,), np.int64)
            own = bias[first_L[number] : first_L[number + 1]]
            write_biases(centroid_LD[number], words_MEJ, code_SM, id_S, alive, by_distance, table_MJ, own)


@compiled(fastmath=ANY_ORDER)
def share_of_list(query_D: Any, centroid_D: Any, by_distance: bool) -> Any:
    """The term that all scores of a list share: minus the squared distance of its centroid, or its product."""
    return neg_sq_l2(query_D, centroid_D) if by_distance else dot(query_D, centroid_D)


@compiled(f"(f4[:,::1], i8[:,::1], i8, {LISTS}, b1, {ROOM}, {SELECTION_ROOM}, i8[:,::1], i8[::1])")
def search_tables(
    query_QD: Any, probed_QP: Any, wanted: int, lists: Any, by_distance: bool, room: Any, selection_room: Any,
    packed_QC: Any, count_Q: Any,
) -> None:  # fmt: skip
    """Write the ``wanted`` best keys of each query's lists, and few others, as packed neighbours in no order.

    Args:
        lists, room, selection_room: ``ListArrays``, ``TableRoom`` and ``SelectionRoom`` as plain tuples: numba takes
            5 us to recognise a named one, and a search with one query less than 400.
        packed_QC, count_Q: get the neighbours, and how many there are.
    """
    words_MEJ, centroid_LD, address_L2, first_L, bias = lists
    table_MJ, score_SP, most_S, edge_1P, end_1P, place_F = room
    parts = words_MEJ.shape[0]
    score_F, gap_1P = score_SP.reshape(-1), np.zeros((1, probed_QP.shape[1]), np.float32)
    for q in range(len(query_QD)):
        query_D = query_QD[q]
        write_table(query_D, words_MEJ, by_distance, table_MJ)
        edge_1P[0, 0] = 0
        for p in range(probed_QP.shape[1]):
            number, group = probed_QP[q, p], edge_1P[0, p]
            edge_1P[0, p + 1] = group
            size = first_L[number + 1] - first_L[number] if number >= 0 else 0
            if size == 0:
                continue
            code_SM = array_at(pointer(address_L2[number, 0]), (size, parts), np.uint8)
            bias_S = bias[first_L[number] : first_L[number + 1]]
            share = share_of_list(query_D, centroid_LD[number], by_distance)
            _sum_up(table_MJ.reshape(-1), code_SM, score_F, group * GROUP)
            edge_1P[0, p + 1] = _finish(score_SP, group, bias_S, share, most_S)
        select_candidates(score_SP, most_S, edge_1P, gap_1P, wanted, place_F, end_1P, selection_room)
        first = 0
        for p in range(probed_QP.shape[1]):
            number = probed_QP[q, p]
            if end_1P[0, p] > first:
                size = first_L[number + 1] - first_L[number]
                id_S = array_at(pointer(address_L2[number, 1]), (size,), np.int64)
                for i in range(first, end_1P[0, p]):
                    packed_QC[q, i] = pack(score_F[place_F[i]], id_S[place_F[i] - edge_1P[0, p] * GROUP])
            first = end_1P[0, p]
        count_Q[q] = first

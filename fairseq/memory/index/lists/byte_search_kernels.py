"""The compiled search by tables of bytes (``adc_search.py``): sums of bytes bound the scores, few are summed exactly.

Import where used: numba takes half a second to load.

Shapes: M parts of a key, J codewords of a part, S keys of a list, P lists a query probes, F keys that were chosen,
B bytes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.lists.adc_kernels import (
    LISTS,
    ROOM,
    SIDE_BY_SIDE,
    array_at,
    pointer,
    share_of_list,
    sum_four,
    write_table,
)
from fairseq.memory.index.lists.byte_table_kernels import MOST_STEPS, SUMS, round_table
from fairseq.memory.index.lists.large_k_kernels import SELECTION_ROOM, select_candidates
from fairseq.memory.index.ops.kernels import ANY_ORDER, GROUP, compiled, largest, pack
from fairseq.memory.index.ops.vector_kernels import fetch

_AHEAD = 8  # keys that are fetched ahead
_BYTE, _EIGHT, _ENTRIES = np.uint64(0xFF), np.uint64(8), np.uint64(256)
_ROUNDING = np.float32(4e-6)  # of sums in float32 over what they are sums of


class ByteCodes(NamedTuple):
    """The codes of an index's lists as ``byte_table_kernels`` sums them."""

    code_B: Any
    first_L: Any
    """First byte of each list."""
    bias_1: Any
    """The largest bias."""


BYTE_CODES = "Tuple((u1[::1], i8[::1], f4[::1]))"
"""Its types, for ``compiled``."""


@compiled(fastmath=ANY_ORDER)
def _write_bounds(sum_2P: Any, step: Any, shift: Any, bias_P: Any, bound_P: Any) -> Any:
    """Write what the scores of a group's keys are at most. Returns: the bits of the largest."""
    bound_P[len(bias_P) :] = -np.inf
    for i in range(len(bias_P)):
        total = (np.int32(sum_2P[0, i]) << np.int32(8)) + np.int32(sum_2P[1, i])
        bound_P[i] = np.float32(total) * step + (bias_P[i] + shift)
    return largest(bound_P.view(np.int32))


@compiled(forceinline=True)
def _sum_eight(table_F: Any, first: Any, word: Any, total: Any) -> Any:
    """Add the entries of eight parts' codes, which are the bytes of an integer."""
    for _ in range(8):
        total += table_F[first + (word & _BYTE)]
        word >>= _EIGHT
        first += _ENTRIES
    return total


@compiled()
def _sum_words(table_F: Any, word_SW: Any, s: Any, t: Any, u: Any, v: Any) -> tuple[Any, Any, Any, Any]:
    """As ``sum_four``, of codes that are read eight at a time: half as many loads."""
    a = b = c = d = np.float32(0.0)
    first = np.uint64(0)
    for w in range(word_SW.shape[1]):
        a = _sum_eight(table_F, first, word_SW[s, w], a)
        b = _sum_eight(table_F, first, word_SW[t, w], b)
        c = _sum_eight(table_F, first, word_SW[u, w], c)
        d = _sum_eight(table_F, first, word_SW[v, w], d)
        first += _ENTRIES * _EIGHT
    return a, b, c, d


@compiled()
def _pack_exact(
    table_F: Any, parts: int, code_at: int, id_at: int, size: int, bias_S: Any, share: Any, place_F: Any,
    first_place: int, packed_F: Any,
) -> None:  # fmt: skip
    """Pack keys of a list with their scores, which are summed as ``adc_kernels.search_tables`` sums them.

    Args:
        code_at, id_at: addresses of the list's codes and ids.
    """
    last = len(place_F) - 1
    code_SM, id_S = array_at(pointer(code_at), (size, parts), np.uint8), array_at(pointer(id_at), (size,), np.int64)
    word_SW = array_at(pointer(code_at), (size, parts // 8), np.uint64)
    for start in range(0, len(place_F), SIDE_BY_SIDE):
        for i in range(_AHEAD + start, min(_AHEAD + start + SIDE_BY_SIDE, last + 1)):
            key = place_F[i] - first_place
            fetch(code_at + key * parts)
            fetch(id_at + key * 8)
        s, t = place_F[start] - first_place, place_F[min(start + 1, last)] - first_place
        u, v = place_F[min(start + 2, last)] - first_place, place_F[min(start + 3, last)] - first_place
        sums = sum_four(table_F, code_SM, s, t, u, v) if parts % 8 else _sum_words(table_F, word_SW, s, t, u, v)
        for i, key in enumerate((s, t, u, v)):
            if start + i <= last:
                packed_F[start + i] = pack(sums[i] + (bias_S[key] + share), id_S[key])


@functools.cache
def byte_search(name: str) -> Any:
    """The kernel of an instruction set that does what ``adc_kernels.search_tables`` does, of the same bits.

    ``(query_QD, probed_QP, wanted, lists, codes, by_distance, room, byte_2MJ, selection_room, packed_QC, count_Q)``:
    ``codes`` are ``ByteCodes`` as a plain tuple, ``byte_2MJ`` room for its bytes.
    """
    sum_bytes = SUMS[name]

    def search(
        query_QD: Any, probed_QP: Any, wanted: int, lists: Any, codes: Any, by_distance: bool, room: Any, byte_2MJ: Any,
        selection_room: Any, packed_QC: Any, count_Q: Any,
    ) -> None:  # fmt: skip
        words_MEJ, centroid_LD, address_L2, first_L, bias = lists
        code_B, first_byte_L, bias_1 = codes
        table_MJ, score_SP, most_S, edge_1P, end_1P, place_F = room
        parts, num_probed = words_MEJ.shape[0], probed_QP.shape[1]
        gap_1P, share_P = np.zeros((1, num_probed), np.float32), np.zeros(num_probed, np.float32)
        sum_2P, most_bits_S = np.empty((2, GROUP), np.uint16), most_S.view(np.int32)
        for q in range(len(query_QD)):
            query_D = query_QD[q]
            write_table(query_D, words_MEJ, by_distance, table_MJ)
            step, base, most = round_table(table_MJ, byte_2MJ)
            edge_1P[0, 0] = 0
            for p in range(num_probed):
                number, group = probed_QP[q, p], edge_1P[0, p]
                edge_1P[0, p + 1] = group
                size = first_L[number + 1] - first_L[number] if number >= 0 else 0
                if size == 0:
                    continue
                share_P[p] = share_of_list(query_D, centroid_LD[number], by_distance)
                half_gap = MOST_STEPS * np.float32(parts) * step + _ROUNDING * (most + bias_1[0] + abs(share_P[p]))
                gap_1P[0, p], shift = np.float32(2.0) * half_gap, base * step + share_P[p] + half_gap
                after = first_byte_L[max(probed_QP[q, min(p + 1, num_probed - 1)], 0)]
                for first in range(0, size, GROUP):
                    at = first_byte_L[number] + first * parts
                    next_at = at + GROUP * parts if first + GROUP < size else after
                    sum_bytes(byte_2MJ, code_B, at, next_at, sum_2P)
                    begin, past = first_L[number] + first, first_L[number] + min(first + GROUP, size)
                    most_bits_S[group] = _write_bounds(sum_2P, step, shift, bias[begin:past], score_SP[group])
                    group += 1
                edge_1P[0, p + 1] = group
            select_candidates(score_SP, most_S, edge_1P, gap_1P, wanted, place_F, end_1P, selection_room)
            first = 0
            for p in range(num_probed):
                number, past = probed_QP[q, p], end_1P[0, p]
                if past > first:
                    size = first_L[number + 1] - first_L[number]
                    bias_S = bias[first_L[number] : first_L[number + 1]]
                    _pack_exact(
                        table_MJ.reshape(-1), parts, address_L2[number, 0], address_L2[number, 1], size, bias_S,
                        share_P[p], place_F[first:past], edge_1P[0, p] * GROUP, packed_QC[q, first:past],
                    )  # fmt: skip
                first = past
            count_Q[q] = first

    search.__qualname__ = f"search_bytes_{name}"
    types = (
        f"f4[:,::1], i8[:,::1], i8, {LISTS}, {BYTE_CODES}, b1, {ROOM}, u1[:,:,::1], {SELECTION_ROOM}, i8[:,::1], "
        "i8[::1]"
    )
    return compiled(f"({types})")(search)

"""The compiled search of one query by tables (``adc_search.py``) without anything between its steps.

Import where used: numba takes half a second to load.

Shapes: Q queries, L lists, P lists a query probes, D width, F keys that were chosen, K neighbours.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.lists.adc_kernels import search_tables, share_of_list
from fairseq.memory.index.lists.byte_search_kernels import byte_search
from fairseq.memory.index.lists.large_k_kernels import unpack
from fairseq.memory.index.ops.kernels import approx_kth_largest, compiled, pack
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances

_LOW_HALF = np.int64(0xFFFFFFFF)
UNPREPARED, TOO_FEW = -1, -2
"""A probed list was not prepared; the lists hold fewer keys than are wanted."""


class SingleRoom(NamedTuple):
    """Memory for the steps of a query, and for its neighbours."""

    share_L: Any
    packed_L: Any
    probed_1P: Any
    """Lists of the query: see :func:`nearest_lists`."""
    packed_1F: Any
    count_1: Any
    ids_1K: Any
    scores_1K: Any


SINGLE_ROOM = "Tuple((f4[::1], i8[::1], i8[:,::1], i8[:,::1], i8[::1], i8[:,::1], f4[:,::1]))"
"""Its types, for ``compiled``."""


@compiled()
def _write_shares(query_D: Any, centroid_LD: Any, by_distance: bool, share_L: Any) -> None:
    """``share_of_list`` for all lists, four at a time: one would wait for each of its sums."""
    whole = len(centroid_LD) // 4 * 4
    for number in range(0, whole, 4):
        row_4D = (
            centroid_LD[number], centroid_LD[number + 1], centroid_LD[number + 2], centroid_LD[number + 3]
        )  # fmt: skip
        share_4 = squared_distances(query_D, row_4D) if by_distance else products(query_D, row_4D)
        for i, share in enumerate(share_4):
            share_L[number + i] = -share if by_distance else share
    for number in range(whole, len(centroid_LD)):
        share_L[number] = share_of_list(query_D, centroid_LD[number], by_distance)


@compiled("(f4[:,::1], f4[:,::1], b1, f4[::1], i8[::1], i8[:,::1])")
def nearest_lists(
    query_QD: Any, centroid_LD: Any, by_distance: bool, share_L: Any, packed_L: Any, probed_QP: Any
) -> None:
    """Write the lists of the nearest centroids, best first, of equals the lower number; -1 where none is at a distance.

    Args:
        share_L, packed_L: room.
    """
    num_probed = probed_QP.shape[1]
    for q in range(len(query_QD)):
        _write_shares(query_QD[q], centroid_LD, by_distance, share_L)
        reach, count = approx_kth_largest(share_L, num_probed), 0
        for number in range(len(centroid_LD)):
            packed_L[count] = pack(share_L[number], np.int64(number))
            count += share_L[number] >= reach and share_L[number] > -np.inf  # a NaN is neither
        best = np.sort(packed_L[:count])
        for p in range(num_probed):
            probed_QP[q, p] = best[p] & _LOW_HALF if p < count else -1


@compiled()
def keep_best(packed_F: Any, wanted: int) -> None:
    """Move the ``wanted`` first of more packed neighbours to the front, in no order."""
    least, most = packed_F[0], packed_F[0]
    for f in range(len(packed_F)):
        least, most = min(least, packed_F[f]), max(most, packed_F[f])
    count = len(packed_F)
    while count != wanted:  # no two are equal, so that some number parts the wanted from the others
        middle, count = (least >> 1) + (most >> 1) + (least & most & 1), 0
        for f in range(len(packed_F)):
            count += packed_F[f] <= middle
        if count < wanted:
            least = middle + 1
        else:
            most = middle
    kept = 0
    for f in range(len(packed_F)):
        packed_F[kept] = packed_F[f]
        kept += packed_F[f] <= most


@functools.cache
def single_search(name: str) -> Any:
    """The kernel of an instruction set (``adc_search.byte_sums``), for calls by other kernels.

    ``(query_1D, lists, codes, by_distance, is_ready_L, room, byte_2MJ, selection_room, single_room)``: plain tuples as
    in ``byte_search``; ``single_room`` gets the neighbours in no order. Returns: 0, or why there are none.
    """
    by_bytes = byte_search(name) if name else None

    def search(
        query_1D: Any, lists: Any, codes: Any, by_distance: bool, is_ready_L: Any, room: Any, byte_2MJ: Any,
        selection_room: Any, single_room: Any,
    ) -> int:  # fmt: skip
        share_L, packed_L, probed_1P, packed_1F, count_1, ids_1K, scores_1K = single_room
        nearest_lists(query_1D, lists[1], by_distance, share_L, packed_L, probed_1P)
        for number in probed_1P[0]:
            if number >= 0 and not is_ready_L[number]:
                return UNPREPARED
        wanted = ids_1K.shape[1]
        if by_bytes is None:
            search_tables(query_1D, probed_1P, wanted, lists, by_distance, room, selection_room, packed_1F, count_1)
        else:
            by_bytes(
                query_1D, probed_1P, wanted, lists, codes, by_distance, room, byte_2MJ, selection_room, packed_1F,
                count_1,
            )  # fmt: skip
        if count_1[0] < wanted:
            return TOO_FEW
        keep_best(packed_1F[0, : count_1[0]], wanted)
        unpack(packed_1F, ids_1K, scores_1K)
        return 0

    search.__qualname__ = f"single_search_{name}"
    return compiled()(search)

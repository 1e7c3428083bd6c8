"""Compiled loops of searches of lists in bulk (``bulk_search.py``): bounds by 8-bit products, and scores in float32.

Import where used: numba takes half a second to load.

Shapes: L lists (of those at hand), P places of their keys one after the other, each list filled up to whole tiles, N
queries of a group, V visits of a list by a query, W lists with visits, R rows of a tile, C candidates a query may hold,
D width, E columns of the products, K neighbours.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.candidates.kernels import append_hits, prune
from fairseq.memory.index.lists.large_k_kernels import NOTHING, pack
from fairseq.memory.index.ops.kernels import ANY_ORDER, LOWEST, approx_kth_largest, compiled, dot, neg_sq_l2
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances
from fairseq.memory.index.ops.rounding_kernels import bounds
from fairseq.memory.index.ops.tile_product_kernels import (
    INSTRUCTIONS,
    TILE_KEYS,
    lowest_bit,
    reaching_keys,
    tile_products,
    tile_registers,
)

CHUNK_KEYS = 4 * TILE_KEYS
"""Keys for which a query must have room before they are compared with it."""
_ROUNDING = np.float32(4e-6)  # of sums in float32 over what they are sums of


class BulkKeys(NamedTuple):
    """The keys of lists; see ``KeyBlock``."""

    first_L: Any
    """Where each list begins, L + 1 numbers."""
    place_L: Any
    """Place of its first key among those of the whole index."""
    turn_L2: Any
    """Keys of the list, and the step between the numbers in it of two that follow each other here."""
    key_B: Any
    start_P: Any
    step_P: Any
    weight_P: Any
    size_P: Any
    bias_P: Any
    slack_P: Any
    keys_PD: Any
    ids_P: Any


class BulkVisits(NamedTuple):
    """Visits of lists by queries, list after list."""

    list_W: Any
    edge_W1: Any
    """First visit of each list, and where the last one's end."""
    query_V: Any
    rank_V: Any
    share_V: Any
    """What all scores of the visit share (see :func:`write_shares`)."""
    slack_V: Any


class BulkQueries(NamedTuple):
    """The queries of a group; see ``Rounding.round_queries``."""

    query_ND: Any
    rows_NE: Any
    about_N4: Any


class BulkCandidates(NamedTuple):
    """The candidates of a group; see ``BoundedCandidates``."""

    lower_NC: Any
    """In the end their scores."""
    place_NC: Any
    """Among all keys of the index; in the end their rows."""
    filled_N: Any
    threshold_N: Any
    start_N: Any
    """The threshold that a sample of the keys tells; of open queries in the end one that k keys reach for certain."""
    width_N: Any
    check_N: Any
    """With so many candidates the threshold is raised: that takes less time than candidates too many."""
    is_open_N: Any
    """Queries that have to be searched again: more keys are equally close than there is room for, or fewer than k
    reached what the sample told."""


# Types of a call, for ``compiled``.
_ABOUT = ", ".join(5 * ["f4[::1]"])
_KEYS = f"Tuple((i8[::1], i8[::1], i8[:,::1], i1[::1], i4[::1], {_ABOUT}, f4[:,::1], i8[::1]))"
_VISITS = "Tuple((i8[::1], i8[::1], i8[::1], i8[::1], f4[::1], f4[::1]))"
_QUERIES = "Tuple((f4[:,::1], i1[:,::1], f4[:,::1]))"
_CANDIDATES = "Tuple((f4[:,::1], i4[:,::1], i8[::1], f4[::1], f4[::1], f4[::1], i8[::1], b1[::1]))"


@compiled(fastmath=ANY_ORDER)
def _sums(query_D: Any, centroid_D: Any, by_distance: bool) -> tuple[Any, Any, Any]:
    """What goes into a share: the squared distance or the product, and the squared lengths."""
    total, length, other = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for d in range(len(query_D)):
        if by_distance:
            difference = query_D[d] - centroid_D[d]
            total += difference * difference
        else:
            total += query_D[d] * centroid_D[d]
            length += query_D[d] * query_D[d]
            other += centroid_D[d] * centroid_D[d]
    return total, length, other


@compiled("(f4[:,::1], f4[:,::1], i8[:,::1], b1, f4[:,::1], f4[:,::1])")
def write_shares(
    query_ND: Any, centroid_LD: Any, probed_NP: Any, by_distance: bool, share_NP: Any, slack_NP: Any
) -> None:
    """What the scores of a list share: minus half the squared distance of its centroid, or its product with the query.

    ``slack_NP`` gets how far sums in float32 may be off, of scores as well.
    """
    for n in range(len(probed_NP)):
        for p in range(probed_NP.shape[1]):
            if probed_NP[n, p] < 0:
                continue
            total, length, other = _sums(query_ND[n], centroid_LD[probed_NP[n, p]], by_distance)
            share_NP[n, p] = np.float32(-0.5) * total if by_distance else total
            slack_NP[n, p] = _ROUNDING * (np.float32(0.5) * total if by_distance else np.sqrt(length) * np.sqrt(other))


@compiled(forceinline=True)
def _copy_row(rows_NE: Any, n: int, row_RE: Any, i: int) -> None:
    for e in range(rows_NE.shape[1]):
        row_RE[i, e] = rows_NE[n, e]


@compiled(forceinline=True)
def _write_lower(
    raw_X: Any, step_P: Any, weight_P: Any, size_P: Any, bias_P: Any, slack_P: Any, key: int, scale: Any, zero: Any,
    width: Any, share: Any, slack: Any, lower_X: Any,
) -> None:  # fmt: skip
    """Write what the scores of the first keys of a tile are at least."""
    for j in range(len(lower_X)):
        m = key + j
        about = (size_P[m], width, bias_P[m], slack_P[m] + slack)
        bound, below = bounds(raw_X[j], zero, step_P[m], weight_P[m], scale, *about)
        lower_X[j] = (bound - below) + (share + slack)


@functools.cache
def sampler(name: str) -> Any:
    """The kernel that writes the lower bounds of some keys of each list, by the tiles of an instruction set.

    ``(visits, queries, keys, candidates, share)``: they are that share of each list's keys, its first ones.
    """
    rows = INSTRUCTIONS[name].rows
    tile = tile_products(name, rows)
    prepare_registers, release_registers = tile_registers(name)

    def sample(visits: Any, queries: Any, keys: Any, candidates: Any, share: float) -> None:
        list_W, edge_W1, query_V, _, share_V, slack_V = visits
        _, rows_NE, about_N4 = queries
        first_L, _, turn_L2, key_B, start_P, step_P, weight_P, size_P, bias_P, slack_P, _, _ = keys
        lower_NC, _, filled_N, _, _, _, _, _ = candidates
        columns = rows_NE.shape[1]
        row_RE, raw_RX = np.zeros((rows, columns), np.int8), np.empty((rows, TILE_KEYS), np.int32)
        prepare_registers()
        for w in range(len(list_W)):
            first = first_L[list_W[w]]
            wanted = np.int64(np.rint(share * turn_L2[list_W[w], 0]))
            for start in range(edge_W1[w], edge_W1[w + 1], rows):
                count = min(rows, edge_W1[w + 1] - start)
                for i in range(count):
                    _copy_row(rows_NE, query_V[start + i], row_RE, i)
                for key in range(first, first + wanted, TILE_KEYS):
                    tile(row_RE, 0, key_B, key * columns, columns, start_P, key, raw_RX)
                    for i in range(count):
                        n, v = query_V[start + i], start + i
                        past = min(filled_N[n] + min(TILE_KEYS, first + wanted - key), lower_NC.shape[1])
                        _write_lower(
                            raw_RX[i], step_P, weight_P, size_P, bias_P, slack_P, key, about_N4[n, 0], about_N4[n, 1],
                            about_N4[n, 2], share_V[v], slack_V[v], lower_NC[n, filled_N[n] : past],
                        )  # fmt: skip
                        filled_N[n] = past
        release_registers()

    sample.__qualname__ = f"sample_{name}"
    return compiled(f"({_VISITS}, {_QUERIES}, {_KEYS}, {_CANDIDATES}, f8)")(sample)


@compiled(f"({_CANDIDATES}, i8)")
def begin_at(candidates: Any, rank: int) -> None:
    """Let queries begin at what so many of the sample reach, and hold no candidates."""
    lower_NC, _, filled_N, threshold_N, start_N, _, _, _ = candidates
    for n in range(len(filled_N)):
        start_N[n] = max(LOWEST, approx_kth_largest(lower_NC[n, : filled_N[n]], rank))
        threshold_N[n], filled_N[n] = start_N[n], 0


@compiled(f"({_CANDIDATES}, i8)")
def prune_group(candidates: Any, k: int) -> None:
    """Drop the candidates of every query that cannot be among its k best, and all where a sample told too much."""
    lower_NC, place_NC, filled_N, threshold_N, start_N, width_N, _, is_open_N = candidates
    for n in range(len(filled_N)):
        if start_N[n] > LOWEST and not is_open_N[n]:
            reached = np.int32(0)
            for c in range(filled_N[n]):
                reached += np.int32(lower_NC[n, c] >= start_N[n])
            if reached < k:
                start_N[n] = max(LOWEST, approx_kth_largest(lower_NC[n, : filled_N[n]], k))
                is_open_N[n], filled_N[n] = True, 0
        filled_N[n], threshold_N[n] = prune(lower_NC[n], place_NC[n], filled_N[n], k, threshold_N[n], width_N[n])


@compiled()
def _raise_threshold(
    n: int, k: int, room: int, lower_NC: Any, place_NC: Any, filled_N: Any, threshold_N: Any, start_N: Any,
    width_N: Any, check_N: Any, is_open_N: Any,
) -> None:  # fmt: skip
    """Find a higher threshold for a query, and room for more candidates.

    Where too many are close to each other it is left open, and finds no more.
    """
    if filled_N[n] <= room:
        threshold_N[n] = max(threshold_N[n], approx_kth_largest(lower_NC[n, : filled_N[n]], k))
    else:
        filled_N[n], threshold_N[n] = prune(lower_NC[n], place_NC[n], filled_N[n], k, threshold_N[n], width_N[n])
        if filled_N[n] > min(room, 3 * lower_NC.shape[1] // 4):
            start_N[n] = max(LOWEST, approx_kth_largest(lower_NC[n, : filled_N[n]], k))
            is_open_N[n], filled_N[n], threshold_N[n] = True, 0, np.inf
    check_N[n] = max(k, filled_N[n]) + k


@functools.cache
def collector(name: str) -> Any:
    """The kernel that collects the keys of some lists that may be among the k best, by an instruction set's tiles."""
    rows, lanes = INSTRUCTIONS[name].rows, max(8, INSTRUCTIONS[name].lanes)
    tile, reaches = tile_products(name, rows), reaching_keys(lanes, rows)
    prepare_registers, release_registers = tile_registers(name)

    def collect(visits: Any, queries: Any, keys: Any, candidates: Any, k: int) -> None:
        list_W, edge_W1, query_V, _, share_V, slack_V = visits
        _, rows_NE, about_N4 = queries
        first_L, place_L, _, key_B, start_P, step_P, weight_P, size_P, bias_P, slack_P, _, _ = keys
        lower_NC, place_NC, filled_N, threshold_N, start_N, width_N, check_N, is_open_N = candidates
        columns, room = rows_NE.shape[1], lower_NC.shape[1] - CHUNK_KEYS
        row_RE, raw_RX = np.zeros((rows, columns), np.int8), np.empty((rows, TILE_KEYS), np.int32)
        about_R4, hit_R = np.zeros((rows, 4), np.float32), np.empty(rows, np.int64)
        prepare_registers()
        for w in range(len(list_W)):
            first, past = first_L[list_W[w]], first_L[list_W[w] + 1]
            first_place = place_L[list_W[w]] - first
            for start in range(edge_W1[w], edge_W1[w + 1], rows):
                count = min(rows, edge_W1[w + 1] - start)
                about_R4[count:, 3] = np.nan  # which nothing reaches, not even infinity
                for i in range(count):
                    n = query_V[start + i]
                    _copy_row(rows_NE, n, row_RE, i)
                    about_R4[i, 0], about_R4[i, 1], about_R4[i, 2] = about_N4[n, 0], about_N4[n, 1], about_N4[n, 2]
                for chunk in range(first, past, CHUNK_KEYS):
                    for i in range(count):
                        n, v = query_V[start + i], start + i
                        if filled_N[n] > min(check_N[n], room):
                            _raise_threshold(
                                n, k, room, lower_NC, place_NC, filled_N, threshold_N, start_N, width_N, check_N,
                                is_open_N,
                            )  # fmt: skip
                        about_R4[i, 3] = threshold_N[n] - (share_V[v] + slack_V[v])
                    for key in range(chunk, min(chunk + CHUNK_KEYS, past), TILE_KEYS):
                        tile(row_RE, 0, key_B, key * columns, columns, start_P, key, raw_RX)
                        hits = reaches(raw_RX, about_R4, 0, step_P, weight_P, size_P, bias_P, key, hit_R)
                        while hits:
                            i = lowest_bit(hits)
                            hits &= hits - 1
                            v = start + i
                            append_hits(
                                raw_RX[i], hit_R[i], step_P, weight_P, size_P, bias_P, slack_P, key, first_place,
                                about_R4[i, 0], about_R4[i, 1], about_R4[i, 2], share_V[v], slack_V[v], query_V[v],
                                lower_NC, place_NC, filled_N, width_N,
                            )  # fmt: skip
        release_registers()

    collect.__qualname__ = f"collect_visits_{name}"
    return compiled(f"({_VISITS}, {_QUERIES}, {_KEYS}, {_CANDIDATES}, i8)")(collect)


@compiled(f"({_VISITS}, {_QUERIES}, {_KEYS}, {_CANDIDATES}, b1, i8[::1], i8[:,::1])")
def score_visits(
    visits: Any, queries: Any, keys: Any, candidates: Any, by_distance: bool, cursor_N: Any, order_NC: Any
) -> None:
    """Score the candidates of visits in place of their bounds, and put their rows in place of their places.

    Args:
        cursor_N: the first of each query that is not scored; moves on.
        order_NC: gets rank of the list << 32, plus the number in the list: the order in which faiss scans keys. Without
            columns where nobody asks for it.
    """
    list_W, edge_W1, query_V, rank_V, _, _ = visits
    query_ND, first_L, place_L, turn_L2, keys_PD, ids_P = queries[0], keys[0], keys[1], keys[2], keys[10], keys[11]
    score_NC, place_NC, filled_N, _, _, _, _, _ = candidates
    for w in range(len(list_W)):
        first, first_place = first_L[list_W[w]], place_L[list_W[w]]
        past_place = first_place + first_L[list_W[w] + 1] - first
        for v in range(edge_W1[w], edge_W1[w + 1]):
            n = query_V[v]
            begin, end, query_D = cursor_N[n], cursor_N[n], query_ND[n]
            while end < filled_N[n] and first_place <= place_NC[n, end] < past_place:
                end += 1
            cursor_N[n] = end
            at, shift = begin, first - first_place
            # Four at a time: four streams of keys hide the waiting for them.
            while at + 4 <= end:
                a, b, c, d = place_NC[n, at], place_NC[n, at + 1], place_NC[n, at + 2], place_NC[n, at + 3]
                keys_4 = (keys_PD[shift + a], keys_PD[shift + b], keys_PD[shift + c], keys_PD[shift + d])
                scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
                for i in range(4):
                    score_NC[n, at + i] = -scores_4[i] if by_distance else scores_4[i]
                at += 4
            while at < end:
                key_D = keys_PD[shift + place_NC[n, at]]
                score_NC[n, at] = neg_sq_l2(query_D, key_D) if by_distance else dot(query_D, key_D)
                at += 1
            for c in range(begin, end):
                place = place_NC[n, c]
                if order_NC.shape[1]:
                    number = (place - first_place) * turn_L2[list_W[w], 1] % turn_L2[list_W[w], 0]
                    order_NC[n, c] = (rank_V[v] << 32) + number
                place_NC[n, c] = ids_P[shift + place]


@compiled(f"({_CANDIDATES}, i8, i8[:,::1])")
def pack_scored(candidates: Any, first: int, packed_QC: Any) -> None:
    """Write the scored candidates of some queries, which begin at ``first``, as packed neighbours."""
    score_NC, row_NC, filled_N, _, _, _, _, _ = candidates
    for q in range(len(packed_QC)):
        n = first + q
        for c in range(filled_N[n]):
            packed_QC[q, c] = pack(score_NC[n, c], np.int64(row_NC[n, c]))
        packed_QC[q, filled_N[n] :] = NOTHING

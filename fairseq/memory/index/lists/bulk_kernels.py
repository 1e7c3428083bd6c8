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

from fairseq.memory.index.candidates.kernels import append_expected, prune
from fairseq.memory.index.lists.large_k_kernels import unpack_row
from fairseq.memory.index.ops.kernels import (
    ANY_ORDER,
    LOWEST,
    approx_kth_largest,
    compiled,
    dot,
    neg_sq_l2,
)
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances
from fairseq.memory.index.ops.rounding_kernels import bounds, length_of
from fairseq.memory.index.ops.tile_loop_kernels import INSTRUCTIONS, TILE_KEYS
from fairseq.memory.index.ops.tile_product_kernels import lowest_bit, reaching_keys, tile_products, tile_registers
from fairseq.memory.index.ops.vector_kernels import count_reaching, fetch

CHUNK_KEYS = 4 * TILE_KEYS
"""Keys for which a query must have room before they are compared with it."""
SCALE, ZERO, WIDTH, REACH, SHARE, SLACK, QUERY, RANK = range(8)
"""What is where in ``BulkVisits.about_V8``."""
ABOUT = 8
_AHEAD, _FETCHED_LINES = 2, 3
_SAMPLED_KEYS = 32  # at a time
_ROUNDING = np.float32(4e-6)  # of sums in float32 over what they are sums of
_SMALLEST = np.float32(1e-30)


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
    number_W: Any
    """The same among all lists of the index."""
    edge_W1: Any
    """First visit of each list, and where the last one's end."""
    row_VE: Any
    """The query as it is rounded for the list, and behind the last visit so many rows more as a tile has."""
    about_V8: Any
    """Step, remainder and width, see ``Rounding.round_queries``; what a key has to reach; what all scores of the visit
    share, and how far that may be off (see :func:`write_shares`). All of a visit together, since it is far from any
    other that is written, or read, next."""
    number_V8: Any
    """The same memory: in its last two columns the query, and which of its lists it is."""


class QueryRounding(NamedTuple):
    """What queries are rounded by for each list."""

    mean_LD: Any
    """What is taken off queries, of each list of the index: the centroid where distances are compared."""
    about_3D: Any
    """Factors of columns, what stands for what rounding drops of queries, and of keys (see ``bounded_scores``)."""
    about_4: Any
    """Levels, what is added to rounded entries, the keys' ratio, and the error of rounding in steps."""


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
_VISITS = "Tuple((i8[::1], i8[::1], i8[::1], i1[:,::1], f4[:,::1], i4[:,::1]))"
_ROUNDING_TYPES = "Tuple((f4[:,::1], f4[:,::1], f4[::1]))"
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


# Views of rows would be counted in and out of use, which takes a third of the time: hence arrays and numbers of rows,
# without a sign, since the others would be looked at for places counted from the end.
@compiled(fastmath=ANY_ORDER)
def _centred(query_ND: Any, n: Any, mean_LD: Any, number: Any, about_3D: Any, out_D: Any, out_bits_D: Any) -> Any:
    """Write ``(query - mean) * factor``. Returns: its squared length, and the bits of its largest entry's size."""
    square, reach = np.float32(0.0), np.int32(0)
    for d in range(np.uint64(query_ND.shape[1])):
        centred = (query_ND[n, d] - mean_LD[number, d]) * about_3D[np.uint64(0), d]
        out_D[d] = centred
        square += centred * centred
    for d in range(np.uint64(query_ND.shape[1])):  # of floats, numba's maximum is not vectorized
        reach = max(reach, out_bits_D[d] & np.int32(0x7FFFFFFF))
    return square, reach


@compiled(fastmath=ANY_ORDER)
def _rounded(centred_D: Any, inverse: Any, levels: Any, zero: Any, about_3D: Any, row_RE: Any, i: Any) -> Any:
    """Write ``floor(x / step + 1/2 - own) + zero``. Returns: the sum of the products of integers + own with other."""
    weighted, half = np.float32(0.0), np.float32(0.5)
    for d in range(np.uint64(len(centred_D))):
        own, other = about_3D[np.uint64(1), d], about_3D[np.uint64(2), d]
        rounded = np.int32(np.floor(centred_D[d] * inverse + (half - own)))
        rounded = min(max(rounded, -levels), levels)  # of floats it would not be vectorized
        weighted += (np.float32(rounded) + own) * other
        row_RE[i, d] = np.int8(rounded + zero)
    return weighted


@compiled("(i8[:,::1], i8[::1], i8[::1], i8[:,::1])")
def arrange_visits(probed_NP: Any, padded_L: Any, edge_L1: Any, place_NP: Any) -> None:
    """Number visits list after list, of a list those of earlier queries first; -1 for lists without keys.

    ``edge_L1`` gets the first visit of each list, and their number; ``padded_L`` ends with the size of no list.
    """
    edge_L1[:] = 0
    for n in range(len(probed_NP)):
        for p in range(probed_NP.shape[1]):
            number = probed_NP[n, p]
            if padded_L[number]:
                edge_L1[number + 1] += 1
    for number in range(len(edge_L1) - 1):
        edge_L1[number + 1] += edge_L1[number]
    next_L = edge_L1.copy()
    for n in range(len(probed_NP)):
        for p in range(probed_NP.shape[1]):
            number = probed_NP[n, p]
            place_NP[n, p] = -1
            if padded_L[number]:
                place_NP[n, p] = next_L[number]
                next_L[number] += 1


@compiled(f"(f4[:,::1], i8[:,::1], i8[:,::1], f4[:,::1], f4[:,::1], {_ROUNDING_TYPES}, {_VISITS})")
def write_visits(
    query_ND: Any, probed_NP: Any, place_NP: Any, share_NP: Any, slack_NP: Any, rounding: Any, visits: Any
) -> None:
    """Write the visits, and round their queries less what is near the list: so products are close to the truth.

    Query by query: centroids stay in the caches of a core, where all queries would not.
    """
    mean_LD, about_3D, about_4 = rounding
    _, _, _, row_VE, about_V8, number_V8 = visits
    ratio, steps, levels, zero = about_4[2], about_4[3], np.int32(about_4[0]), np.int32(about_4[1])
    centred_D, reach_1 = np.empty(query_ND.shape[1], np.float32), np.empty(1, np.int32)
    bits_D, reach_of_1 = centred_D.view(np.int32), reach_1.view(np.float32)
    row_VE[len(about_V8) :] = 0
    for n in range(len(place_NP)):
        for p in range(place_NP.shape[1]):
            if place_NP[n, p] < 0:
                continue
            v, number = np.uint64(place_NP[n, p]), np.uint64(probed_NP[n, p])
            about_V8[v, SHARE], about_V8[v, SLACK] = share_NP[n, p], slack_NP[n, p]
            number_V8[v, QUERY], number_V8[v, RANK] = n, p
            square, reach_1[0] = _centred(query_ND, np.uint64(n), mean_LD, number, about_3D, centred_D, bits_D)
            step = max(reach_of_1[0], _SMALLEST) / about_4[0]
            about_V8[v, SCALE] = step
            about_V8[v, ZERO] = _rounded(centred_D, np.float32(1.0) / step, levels, zero, about_3D, row_VE, v)
            length = length_of(square, reach_of_1[0], query_ND.shape[1])
            relative = length * ratio / step  # its square is a number where those of length and step may be none
            about_V8[v, WIDTH] = steps * step * np.sqrt(relative * relative + np.float32(1.0)) + _ROUNDING * length
            for e in range(query_ND.shape[1], row_VE.shape[1]):
                row_VE[v, e] = 0


@compiled(forceinline=True)
def _write_lower(
    raw_X: Any, step_P: Any, weight_P: Any, size_P: Any, bias_P: Any, slack_P: Any, key: int, scale: Any, zero: Any,
    width: Any, share: Any, slack: Any, part: Any, lower_X: Any,
) -> None:  # fmt: skip
    """Write what the scores of the first keys of a tile are taken for."""
    for j in range(len(lower_X)):
        m = key + j
        about = (size_P[m], width, bias_P[m], slack_P[m] + slack)
        bound, below = bounds(raw_X[j], zero, step_P[m], weight_P[m], scale, *about)
        lower_X[j] = (bound - part * below) + (share + slack)


@functools.cache
def sampler(name: str) -> Any:
    """The kernel that writes what the scores of some keys of each list are taken for, by an instruction set's tiles.

    ``(visits, keys, candidates, part, share)``: they are that share of each list's keys, its first ones.
    """
    rows = INSTRUCTIONS[name].rows
    tile = tile_products(name, rows, _SAMPLED_KEYS)
    prepare_registers, release_registers = tile_registers(name)

    def sample(visits: Any, keys: Any, candidates: Any, part: Any, share: float) -> None:
        list_W, _, edge_W1, row_VE, about_V8, number_V8 = visits
        first_L, _, turn_L2, key_B, start_P, step_P, weight_P, size_P, bias_P, slack_P, _, _ = keys
        lower_NC, _, filled_N, _, _, _, _, _ = candidates
        columns, raw_RX = row_VE.shape[1], np.empty((rows, _SAMPLED_KEYS), np.int32)
        prepare_registers()
        for w in range(len(list_W)):
            first = first_L[list_W[w]]
            wanted = np.int64(np.rint(share * turn_L2[list_W[w], 0]))
            for start in range(edge_W1[w], edge_W1[w + 1], rows):
                count = min(rows, edge_W1[w + 1] - start)
                for key in range(first, first + wanted, _SAMPLED_KEYS):
                    tile(row_VE, start, key_B, key * columns, columns, start_P, key, raw_RX)
                    for i in range(count):
                        v = start + i
                        n = np.int64(number_V8[v, QUERY])
                        past = min(filled_N[n] + min(_SAMPLED_KEYS, first + wanted - key), lower_NC.shape[1])
                        _write_lower(
                            raw_RX[i], step_P, weight_P, size_P, bias_P, slack_P, key, about_V8[v, SCALE],
                            about_V8[v, ZERO], about_V8[v, WIDTH], about_V8[v, SHARE], about_V8[v, SLACK], part,
                            lower_NC[n, filled_N[n] : past],
                        )  # fmt: skip
                        filled_N[n] = past
        release_registers()

    sample.__qualname__ = f"sample_{name}"
    return compiled(f"({_VISITS}, {_KEYS}, {_CANDIDATES}, f4, f8)")(sample)


@compiled(f"({_CANDIDATES}, i8)")
def begin_at(candidates: Any, rank: int) -> None:
    """Let queries begin at what so many of the sample reach, and hold no candidates."""
    lower_NC, _, filled_N, threshold_N, start_N, _, _, _ = candidates
    for n in range(len(filled_N)):
        start_N[n] = max(LOWEST, approx_kth_largest(lower_NC[n, : filled_N[n]], rank))
        threshold_N[n], filled_N[n] = start_N[n], 0


@compiled(forceinline=True)
def _certain(lower_C: Any, k: int, width: Any, part: Any) -> Any:
    """A score that k candidates reach for certain."""
    one = np.float32(1.0)
    return max(LOWEST, approx_kth_largest(lower_C, k) - (one - part) / part * width)


@compiled(f"({_CANDIDATES}, i8, f4)")
def prune_group(candidates: Any, k: int, part: Any) -> None:
    """Drop the candidates of every query that are not among its k best, and all where a sample told too much."""
    lower_NC, place_NC, filled_N, threshold_N, start_N, width_N, _, is_open_N = candidates
    for n in range(len(filled_N)):
        lower_C = lower_NC[n, : filled_N[n]]
        if start_N[n] > LOWEST and not is_open_N[n] and count_reaching(lower_C, start_N[n]) < k:
            start_N[n] = _certain(lower_C, k, width_N[n], part)
            is_open_N[n], filled_N[n] = True, 0
        filled_N[n], threshold_N[n] = prune(lower_NC[n], place_NC[n], filled_N[n], k, threshold_N[n], width_N[n])


@compiled()
def _raise_threshold(
    n: int, k: int, part: Any, room: int, lower_NC: Any, place_NC: Any, filled_N: Any, threshold_N: Any, start_N: Any,
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
            start_N[n] = _certain(lower_NC[n, : filled_N[n]], k, width_N[n], part)
            is_open_N[n], filled_N[n], threshold_N[n] = True, 0, np.inf
    check_N[n] = max(k, filled_N[n]) + k


@functools.cache
def collector(name: str) -> Any:
    """The kernel that collects the keys of some lists that may be among the k best, by an instruction set's tiles."""
    rows, lanes = INSTRUCTIONS[name].rows, max(8, INSTRUCTIONS[name].lanes)
    tile, reaches = tile_products(name, rows), reaching_keys(lanes, rows, ABOUT)
    prepare_registers, release_registers = tile_registers(name)

    def collect(visits: Any, keys: Any, candidates: Any, k: int, part: Any) -> None:
        list_W, _, edge_W1, row_VE, about_V8, number_V8 = visits
        first_L, place_L, _, key_B, start_P, step_P, weight_P, size_P, bias_P, slack_P, _, _ = keys
        lower_NC, place_NC, filled_N, threshold_N, start_N, width_N, check_N, is_open_N = candidates
        columns, room = row_VE.shape[1], lower_NC.shape[1] - CHUNK_KEYS
        raw_RX, hit_R = np.empty((rows, TILE_KEYS), np.int32), np.empty(rows, np.int64)
        prepare_registers()
        for w in range(len(list_W)):
            first, past = first_L[list_W[w]], first_L[list_W[w] + 1]
            first_place = place_L[list_W[w]] - first
            for start in range(edge_W1[w], edge_W1[w + 1], rows):
                count = min(rows, edge_W1[w + 1] - start)
                own = (np.int64(1) << count) - 1  # rows behind are of other lists
                for chunk in range(first, past, CHUNK_KEYS):
                    for v in range(start, start + count):
                        n = np.int64(number_V8[v, QUERY])
                        if filled_N[n] > min(check_N[n], room):
                            _raise_threshold(
                                n, k, part, room, lower_NC, place_NC, filled_N, threshold_N, start_N, width_N,
                                check_N, is_open_N,
                            )  # fmt: skip
                        about_V8[v, REACH] = threshold_N[n] - (about_V8[v, SHARE] + about_V8[v, SLACK])
                    for key in range(chunk, min(chunk + CHUNK_KEYS, past), TILE_KEYS):
                        tile(row_VE, start, key_B, key * columns, columns, start_P, key, raw_RX)
                        hits = own & reaches(raw_RX, about_V8, start, step_P, weight_P, size_P, bias_P, key, hit_R)
                        while hits:
                            i = lowest_bit(hits)
                            hits &= hits - 1
                            v = start + i
                            append_expected(
                                raw_RX[i], hit_R[i], step_P, weight_P, size_P, bias_P, slack_P, key, first_place,
                                about_V8[v, SCALE], about_V8[v, ZERO], about_V8[v, WIDTH], about_V8[v, SHARE],
                                about_V8[v, SLACK], part, np.int64(number_V8[v, QUERY]), lower_NC, place_NC, filled_N,
                                width_N,
                            )  # fmt: skip
        release_registers()

    collect.__qualname__ = f"collect_visits_{name}"
    return compiled(f"({_VISITS}, {_KEYS}, {_CANDIDATES}, i8, f4)")(collect)


@compiled(forceinline=True)
def _fetch_candidates(score_NC: Any, place_NC: Any, query_ND: Any, n: int, begin: int) -> None:
    """Fetch a query and its next candidates, which a core would wait for."""
    at = np.uint64(4) * np.uint64(n * score_NC.shape[1] + begin)
    for line in range(_FETCHED_LINES):
        fetch(np.uint64(score_NC.ctypes.data) + at + np.uint64(64 * line))
        fetch(np.uint64(place_NC.ctypes.data) + at + np.uint64(64 * line))
    row = np.uint64(query_ND.ctypes.data) + np.uint64(4 * n * query_ND.shape[1])
    for d in range(0, query_ND.shape[1], 16):
        fetch(row + np.uint64(4 * d))


@compiled(f"({_VISITS}, f4[:,::1], {_KEYS}, {_CANDIDATES}, b1, i8[::1], i8[:,::1])")
def score_visits(
    visits: Any, query_ND: Any, keys: Any, candidates: Any, by_distance: bool, cursor_N: Any, order_NC: Any
) -> None:
    """Score the candidates of visits in place of their bounds, and put their rows in place of their places.

    Args:
        cursor_N: the first of each query that is not scored; moves on.
        order_NC: gets rank of the list << 32, plus the number in the list: the order in which faiss scans keys. Without
            columns where nobody asks for it.
    """
    list_W, _, edge_W1, _, _, number_V8 = visits
    first_L, place_L, turn_L2, keys_PD, ids_P = keys[0], keys[1], keys[2], keys[10], keys[11]
    score_NC, place_NC, filled_N, _, _, _, _, _ = candidates
    for w in range(len(list_W)):
        first, first_place = first_L[list_W[w]], place_L[list_W[w]]
        past_place, shift = first_place + first_L[list_W[w] + 1] - first, first - first_place
        for v in range(edge_W1[w], edge_W1[w + 1]):
            if v + _AHEAD < edge_W1[w + 1]:
                n = np.int64(number_V8[v + _AHEAD, QUERY])
                _fetch_candidates(score_NC, place_NC, query_ND, n, cursor_N[n])
            n = np.int64(number_V8[v, QUERY])
            place_C, score_C, query_D = place_NC[n], score_NC[n], query_ND[n]
            begin, end = np.uint64(cursor_N[n]), np.uint64(cursor_N[n])
            while end < np.uint64(filled_N[n]) and first_place <= place_C[end] < past_place:
                end += np.uint64(1)
            cursor_N[n] = np.int64(end)
            at = begin
            # Four at a time: four streams of keys hide the waiting for them.
            while at + np.uint64(4) <= end:
                a, b = np.uint64(shift + place_C[at]), np.uint64(shift + place_C[at + np.uint64(1)])
                c, d = np.uint64(shift + place_C[at + np.uint64(2)]), np.uint64(shift + place_C[at + np.uint64(3)])
                keys_4 = (keys_PD[a], keys_PD[b], keys_PD[c], keys_PD[d])
                scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
                for i in range(4):
                    score_C[at + np.uint64(i)] = -scores_4[i] if by_distance else scores_4[i]
                at += np.uint64(4)
            while at < end:
                key_D = keys_PD[np.uint64(shift + place_C[at])]
                score_C[at] = neg_sq_l2(query_D, key_D) if by_distance else dot(query_D, key_D)
                at += np.uint64(1)
            if order_NC.shape[1]:
                for c in range(begin, end):
                    number = (place_C[c] - first_place) * turn_L2[list_W[w], 1] % turn_L2[list_W[w], 0]
                    order_NC[n, c] = (np.int64(number_V8[v, RANK]) << 32) + number
            for c in range(begin, end):
                place_C[c] = ids_P[np.uint64(shift + place_C[c])]


@compiled(f"({_CANDIDATES}, i8, b1, f4)")
def check_scored(candidates: Any, k: int, by_distance: bool, part: Any) -> None:
    """Leave those queries open of which fewer than k scores reach what keys had to reach: others may have been better.

    Scores are as the metric has them, thresholds half of that where distances are compared.
    """
    score_NC, _, filled_N, threshold_N, start_N, _, _, is_open_N = candidates
    twice = np.float32(2.0) if by_distance else np.float32(1.0)
    for n in range(len(filled_N)):
        if part < np.float32(1.0) and not is_open_N[n]:
            score_C = score_NC[n, : filled_N[n]]
            if count_reaching(score_C, twice * threshold_N[n]) < k:
                start_N[n] = max(LOWEST, approx_kth_largest(score_C, k) / twice)
                is_open_N[n], filled_N[n] = True, 0


@compiled("(i8[:,::1], i8, i8[::1], i8[:,::1], f4[:,::1])")
def unpack_rows(packed_QC: Any, columns: int, number_Q: Any, ids_NK: Any, scores_NK: Any) -> None:
    """Turn packed neighbours, sorted, into those of some queries, see ``large_k_kernels.unpack``."""
    for q in range(len(number_Q)):
        unpack_row(packed_QC, q, columns, ids_NK, scores_NK, number_Q[q])

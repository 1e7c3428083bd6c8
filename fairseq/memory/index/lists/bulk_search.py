"""Searches the lists of an inverted-file index for many queries at once, by products of rounded vectors.

A key is the centroid of its list plus a residual. Residuals and queries, these for each list less its centroid as well
where distances are compared, are rounded to 8 bits; their products, whose error is bounded (``bounded_scores``), and
what a list's keys share bound every score from both sides. Only keys whose bound reaches a threshold are scored in
float32. An index of compressed keys is searched several times faster so than by its own tables.

The threshold is what k keys are expected to reach: a part of each list's keys tells with which to begin, and the keys
themselves, which are taken for little less than the middle of their bounds, tell higher ones. A query of which fewer
than k scores have reached the last threshold in the end is searched again, with one that k keys reach for certain: so
the neighbours are those of comparing every key.

Shapes: N queries, P lists a query probes, W lists, V visits of a list by a query, C candidates a query may hold,
K neighbours, D width.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.candidates import best_kernels
from fairseq.memory.index.candidates.room import capacity
from fairseq.memory.index.lists import bulk_kernels, tie_kernels
from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops.kernels import LOWEST, NOTHING
from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.types import Array
from fairseq.runtime.threads import map_in_threads, run_in_threads

TakePart = Callable[[Array, Array, Array], None]
"""Takes the numbers of some queries, their neighbours' rows and scores, (Q, k), each query once.

Several threads call it, and the arrays are written over later."""

_ROOM_BYTES = 160 << 20
"""For the candidates of queries that are searched at a time, kept for the next search."""
_DECODING_ROOM_BYTES = 512 << 20
"""The same where lists are decoded again for each such part of the queries."""
_PART = 0.6
"""Scores are expected so far down from their upper bounds to the lower ones. Nearly all are close to the middle: bounds
that hold for certain are eight standard deviations away."""
# Of the k best so many are expected in the sample, and the threshold is what more of them reach: of 30,000 queries one
# expects too much.
_EXPECTED, _SURELY = 48, 4.0
_SAMPLED_SHARE = 0.125
_MORE_ROOM = 8
_ROWS_BEHIND = 64
"""Rows that a tile may read after the last visit's."""
_PACKED_QUERIES, _SETTLED_QUERIES = 64, 1024
_FEWEST = 256
"""Queries of the last, smallest groups: fewer would pass over the same lists in turn."""


def search_in_bulk(
    lists: DecodedLists, query_ND: Tensor, k: int, *, ties_of_faiss: bool = False
) -> tuple[Tensor, Tensor]:
    """The k best keys of the probed lists, best first, of equals the lower row.

    Args:
        query_ND: float32.
        ties_of_faiss: of keys that are equally close at place k take those that faiss takes, rather than the first.
    Returns: rows, int64 (N, k), -1 where fewer were found, and scores, float32 (N, k), minus infinity there.
    """
    # NumPy has large arrays in large pages, which come several times faster than small ones.
    ids_NK = np.empty((len(query_ND), k), np.int64)
    scores_NK = np.empty((len(query_ND), k), np.float32)
    _run(_BulkSearch(lists, query_ND, k, ties_of_faiss=ties_of_faiss), _Whole(ids_NK, scores_NK))
    return torch.from_numpy(ids_NK), torch.from_numpy(scores_NK)


def search_in_parts(lists: DecodedLists, query_ND: Tensor, k: int, take: TakePart) -> None:
    """:func:`search_in_bulk` that hands over some queries' neighbours at a time, each query's in no order.

    All neighbours together would be written to memory that is not in the caches, and read from there.
    """
    _run(_BulkSearch(lists, query_ND, k, ties_of_faiss=False), _Parts(k, take))


def _run(search: _BulkSearch, out: _Whole | _Parts) -> None:
    lists, k = search.lists, search.k
    # Queries that probe the same lists are searched together: so a group of them passes over fewer lists.
    numbers, room = np.argsort(lists.ranks[search.probed_NP[:, 0]], kind="stable"), capacity(k)
    again = search.run(numbers, room, out, expects=True)
    while len(again):
        room = min(_MORE_ROOM * room, max(capacity(k), search.most_keys(again)))
        again = search.run(again, room, out, expects=False)


class _Whole(NamedTuple):
    """Gets the neighbours of all queries, best first."""

    ids_NK: Array
    scores_NK: Array


class _Parts:
    """Hands over the neighbours of some queries at a time, in no order."""

    def __init__(self, k: int, take: TakePart) -> None:
        self._k, self._take, self._own = k, take, threading.local()

    def memory(self, count: int) -> tuple[Array, Array]:
        """The calling thread's memory for the rows and scores of so many queries."""
        if not hasattr(self._own, "ids_QK"):
            shape = (_PACKED_QUERIES, self._k)
            self._own.ids_QK, self._own.scores_QK = np.empty(shape, np.int64), np.empty(shape, np.float32)
        return self._own.ids_QK[:count], self._own.scores_QK[:count]

    def hand_over(self, is_open_Q: Array, numbers_Q: Array, ids_QK: Array, scores_QK: Array) -> None:
        """Hand over those of queries that are not open."""
        own = numbers_Q, ids_QK, scores_QK
        self._take(*((each[~is_open_Q] for each in own) if is_open_Q.any() else own))


class _Plan(NamedTuple):
    """How groups of queries are searched."""

    room: int
    """Candidates that a query may hold."""
    part: float
    """Scores are taken for so far down from their upper bounds to the lower ones, see ``_PART``."""
    share: float
    """Of each list's keys, which tells with which threshold to begin; 0 to begin without."""
    out: _Whole | _Parts


class _BulkSearch:
    """Some queries, and which lists they probe."""

    def __init__(self, lists: DecodedLists, query_ND: Tensor, k: int, *, ties_of_faiss: bool) -> None:
        self.lists, self.k, self.ties_of_faiss = lists, k, ties_of_faiss
        self.probed_NP = lists.probed_lists(query_ND).numpy()
        self.query_ND = np.ascontiguousarray(query_ND.numpy())
        self.floor_N = np.full(len(query_ND), LOWEST, np.float32)
        """A score that k keys reach for certain."""
        self.share_NP, self.slack_NP = (np.zeros(self.probed_NP.shape, np.float32) for _ in range(2))
        step = max(1, -(-len(query_ND) // (4 * torch.get_num_threads())))
        parts = [slice(first, first + step) for first in range(0, len(query_ND), step)]
        run_in_threads(self._write_shares, parts)

    def _write_shares(self, part: slice) -> None:
        outs = (self.share_NP[part], self.slack_NP[part])
        centroids = self.lists.centroid_LD.numpy()
        bulk_kernels.write_shares(self.query_ND[part], centroids, self.probed_NP[part], self.lists.by_distance, *outs)

    def most_keys(self, numbers: Array) -> int:
        """Places that the lists of one of these queries take, of the one with most."""
        return int(self.lists.padded_sizes()[self.probed_NP[numbers]].sum(1).max(initial=0)) + bulk_kernels.CHUNK_KEYS

    def run(self, numbers: Array, room: int, out: _Whole | _Parts, *, expects: bool) -> Array:
        """Search for some of the queries, each of which may hold so many candidates.

        Returns: the numbers of those that have to be searched again, with more room.
        """
        threads, place_bytes = torch.get_num_threads(), 16 if self.ties_of_faiss else 8
        limit = _ROOM_BYTES if self.lists.is_kept else _DECODING_ROOM_BYTES
        query_bytes = place_bytes * room + self.probed_NP.shape[1] * (self.lists.columns + 4 * bulk_kernels.ABOUT)
        rows_bytes = _ROWS_BEHIND * self.lists.columns
        size = max(1, (limit // threads - rows_bytes) // query_bytes)
        rounds = max(1, -(-len(numbers) // (threads * size)))
        size = max(1, -(-len(numbers) // (threads * rounds)))  # as many for each thread in each round
        share = self._sampled_share(numbers, room) if expects else 0.0
        plan = _Plan(room, _PART if share else 1.0, share, out)
        rooms = self.lists.rooms(threads, size * query_bytes + rows_bytes)
        search_all = self._each_alone if self.lists.is_kept else self._together
        try:
            again = search_all(numbers, size, plan, rooms)
        finally:
            self.lists.keep_rooms(rooms)
        return np.concatenate(again) if again else np.empty(0, np.int64)

    def _each_alone(self, numbers: Array, size: int, plan: _Plan, rooms: list[Array]) -> list[Array]:
        """Search by groups, each from its beginning to its end by one thread. Returns: what each leaves open.

        Groups become smaller towards the end, so that all threads end at nearly the same time.
        """
        wanted, free = np.unique(self.probed_NP[numbers]), list(rooms)
        next(self.lists.batches(wanted[wanted >= 0]))  # decoded by all threads, and kept

        def search(part: Array) -> Array:
            memory = free.pop()
            try:
                return self._search([_Group(self, part, plan, memory)], plan)[0]
            finally:
                free.append(memory)

        return list(map_in_threads(search, _shrinking(numbers, size, len(rooms))))

    def _together(self, numbers: Array, size: int, plan: _Plan, rooms: list[Array]) -> list[Array]:
        """:meth:`_each_alone`, where as many groups at a time as there are threads share lists that are decoded."""
        parts, again = [numbers[first : first + size] for first in range(0, len(numbers), size)], []
        for first in range(0, len(parts), len(rooms)):
            given = list(zip(parts[first : first + len(rooms)], rooms))
            groups = list(map_in_threads(lambda each: _Group(self, each[0], plan, each[1]), given))
            again += self._search(groups, plan)
        return again

    def _search(self, groups: list[_Group], plan: _Plan) -> list[Array]:
        """Search for the queries of groups, step by step. Returns: what each group leaves open."""
        if plan.share:
            self._for_all_lists(groups, _Group.sample, share=plan.share)
            run_in_threads(_Group.begin, groups)
        self._for_all_lists(groups, _Group.collect)
        run_in_threads(_Group.prune, groups)
        self._for_all_lists(groups, _Group.score, rounded=False)
        run_in_threads(_Group.write_best, groups)
        return [group.open_numbers() for group in groups]

    def _sampled_share(self, numbers: Array, room: int) -> float:
        """The share of a list's keys that tell the first threshold; 0 where they tell too little."""
        size_N = self.lists.padded_sizes()[self.probed_NP[numbers]].sum(1)
        most, least = int(size_N.max(initial=0)), int(size_N.min(initial=1 << 62))
        share = min(_SAMPLED_SHARE, _EXPECTED / self.k, room / max(1, most))
        return share if 8 * self.k <= least else 0.0

    def _for_all_lists(self, groups: list[_Group], step: Callable[..., None], **wanted_of_lists: Any) -> None:
        """A step of groups with each of the lists that they visit, as many at a time as are at hand."""
        wanted = np.unique(np.concatenate([group.numbers for group in groups]))
        for keys in self.lists.batches(wanted, **wanted_of_lists) if len(wanted) else ():
            run_in_threads(functools.partial(step, keys=keys), groups)


def _shrinking(numbers: Array, size: int, threads: int) -> list[Array]:
    """Parts of at most so many, the last ones a half of the others, a quarter, and so on: threads end together."""
    parts, first, fewest = [], 0, _FEWEST if threads > 1 else size
    while first < len(numbers):
        left = -(-(len(numbers) - first) // (2 * threads))
        own = min(size, max(left, fewest))
        parts.append(numbers[first : first + own])
        first += own
    return parts


class _Group:
    """Some queries and the candidates they hold; one thread works on it at a time."""

    def __init__(self, search: _BulkSearch, numbers: Array, plan: _Plan, memory: Array) -> None:
        self._search, self._numbers, self._k, self._plan = search, numbers, search.k, plan
        self._part, room = np.float32(plan.part), plan.room
        self._name = search.lists.products.name
        count, pairs = len(numbers), memory[: 8 * len(numbers) * room]
        self._candidates = bulk_kernels.BulkCandidates(
            lower_NC=pairs[: len(pairs) // 2].view(np.float32).reshape(count, room),
            place_NC=pairs[len(pairs) // 2 :].view(np.int32).reshape(count, room),
            filled_N=np.zeros(count, np.int64),
            threshold_N=search.floor_N[numbers],
            start_N=np.full(count, LOWEST, np.float32),
            width_N=np.zeros(count, np.float32),
            check_N=np.full(count, search.k, np.int64),
            is_open_N=np.zeros(count, np.bool_),
        )
        order = None
        if search.ties_of_faiss:
            order = memory[len(pairs) : 2 * len(pairs)].view(np.int64).reshape(count, room)
        self._order_NC = np.empty((count, 0), np.int64) if order is None else order
        self._cursor_N = np.zeros(count, np.int64)
        self._query_ND = search.query_ND[numbers]
        self._visits = self._arranged(memory[(1 if order is None else 2) * len(pairs) :])

    def _arranged(self, memory: Array) -> bulk_kernels.BulkVisits:
        """The visits of lists that have keys, list after list."""
        search, lists = self._search, self._search.lists
        probed_NP = search.probed_NP[self._numbers]
        edge_L1, place_NP = np.empty(len(lists) + 1, np.int64), np.empty(probed_NP.shape, np.int64)
        bulk_kernels.arrange_visits(probed_NP, lists.padded_sizes(), edge_L1, place_NP)
        count, columns = int(edge_L1[-1]), lists.columns
        number_W = np.flatnonzero(np.diff(edge_L1))
        about_bytes = 4 * bulk_kernels.ABOUT * count
        about_V8 = memory[:about_bytes].view(np.float32).reshape(count, bulk_kernels.ABOUT)
        row_VE = memory[about_bytes:][: (count + _ROWS_BEHIND) * columns].view(np.int8).reshape(-1, columns)
        lists_W = (number_W, number_W, np.append(edge_L1[number_W], count))
        visits = bulk_kernels.BulkVisits(*lists_W, row_VE, about_V8, about_V8.view(np.int32))
        shares = (search.share_NP[self._numbers], search.slack_NP[self._numbers])
        bulk_kernels.write_visits(
            self._query_ND, probed_NP, place_NP, *shares, tuple(lists.query_rounding), tuple(visits)
        )
        return visits

    @property
    def numbers(self) -> Array:
        """Lists that are visited, ascending."""
        numbers: Array = self._visits.number_W
        return numbers

    def _with(self, keys: tuple[Array, bulk_kernels.BulkKeys]) -> tuple[Any, Any, Any]:
        """What kernels take: the visits of lists at hand, which follow each other, under their places among those."""
        visits, numbers_L = self._visits, keys[0]
        if len(numbers_L):
            first, past = np.searchsorted(visits.number_W, (numbers_L[0], numbers_L[-1] + 1))
            own, edges = visits.number_W[first:past], visits.edge_W1[first : past + 1]
            visits = visits._replace(list_W=np.searchsorted(numbers_L, own), number_W=own, edge_W1=edges)
        return tuple(visits), tuple(keys[1]), tuple(self._candidates)

    def sample(self, keys: tuple[Array, bulk_kernels.BulkKeys]) -> None:
        """Bound the scores of a share of the keys of some lists."""
        bulk_kernels.sampler(self._name)(*self._with(keys), self._part, self._plan.share)

    def begin(self) -> None:
        """Let queries begin at a threshold that k of all keys reach nearly always, by that share of them."""
        expected = self._k * self._plan.share
        rank = math.ceil(expected + _SURELY * math.sqrt(expected) + _SURELY)
        bulk_kernels.begin_at(tuple(self._candidates), rank)

    def collect(self, keys: tuple[Array, bulk_kernels.BulkKeys]) -> None:
        """Collect the keys of some lists that may be among the k best."""
        bulk_kernels.collector(self._name)(*self._with(keys), self._k, self._part)

    def prune(self) -> None:
        """Drop what cannot be among the k best."""
        bulk_kernels.prune_group(tuple(self._candidates), self._k, self._part)

    def score(self, keys: tuple[Array, bulk_kernels.BulkKeys]) -> None:
        """Score the candidates of some lists."""
        visits, own_keys, candidates = self._with(keys)
        own = (self._search.lists.by_distance, self._cursor_N, self._order_NC)
        bulk_kernels.score_visits(visits, self._query_ND, own_keys, candidates, *own)

    def open_numbers(self) -> Array:
        """Numbers of the queries that have to be searched again; what is known of their k-th score is noted."""
        is_open_N = self._candidates.is_open_N
        numbers: Array = self._numbers[is_open_N]
        self._search.floor_N[numbers] = self._candidates.start_N[is_open_N]
        return numbers

    def write_best(self) -> None:
        """Write the k best candidates."""
        count, out = len(self._numbers), self._plan.out
        bulk_kernels.check_scored(tuple(self._candidates), self._k, self._search.lists.by_distance, self._part)
        for first in range(0, count, _PACKED_QUERIES):
            part = slice(first, min(first + _PACKED_QUERIES, count))
            if isinstance(out, _Parts):
                self._hand_over(part, out)
            else:
                self._write_in_order(part, out)

    @property
    def _scored(self) -> tuple[Array, Array, Array]:
        """Scores and rows of the candidates, and how many they are."""
        return self._candidates.lower_NC, self._candidates.place_NC, self._candidates.filled_N

    def _hand_over(self, part: slice, out: _Parts) -> None:
        """Hand over the k best of some queries."""
        ids_QK, scores_QK = out.memory(part.stop - part.start)
        best_kernels.take_best(*self._scored, part.start, ids_QK, scores_QK)
        out.hand_over(self._candidates.is_open_N[part], self._numbers[part], ids_QK, scores_QK)

    def _write_in_order(self, part: slice, out: _Whole) -> None:
        """Write the k best of some queries; those of open ones will be written again."""
        k, most = self._k, int(self._candidates.filled_N[part].max())
        packed_QC = np.empty((part.stop - part.start, most), np.int64)
        most = best_kernels.pack_best(*self._scored, part.start, k, packed_QC)
        packed_QC[:, :most].sort(axis=1)  # NumPy sorts integers with vector instructions
        bulk_kernels.unpack_rows(packed_QC, most, self._numbers[part], out.ids_NK, out.scores_NK)
        if self._search.ties_of_faiss and most > k:
            score_2Q = packed_QC[:, k - 1 : k + 1].T >> 32
            is_tied_Q = (score_2Q[0] == score_2Q[1]) & (packed_QC[:, k] != NOTHING)
            self._settle(np.flatnonzero(is_tied_Q) + part.start, out.ids_NK)

    def _settle(self, tied_H: Array, ids_NK: Array) -> None:
        """Of keys that tie at place k take those that faiss takes."""
        for first in range(0, len(tied_H), _SETTLED_QUERIES):
            rows = tied_H[first : first + _SETTLED_QUERIES]
            filled_H = self._candidates.filled_N[rows]
            most = int(filled_H.max())
            score_HC, row_HC = self._candidates.lower_NC[rows, :most], self._candidates.place_NC[rows, :most]
            score_HC[np.arange(most) >= filled_H[:, None]] = -np.inf
            place_HC = argsort_descending(score_HC)
            score_HC, order_HC = (np.take_along_axis(x, place_HC, 1) for x in (score_HC, self._order_NC[rows, :most]))
            ids_HC = np.take_along_axis(row_HC, place_HC, 1).astype(np.int64)
            tie_kernels.order_equals(score_HC, ids_HC, order_HC, filled_H)
            own = (filled_H, self._k, np.arange(len(rows)), self._search.lists.by_distance)
            tie_kernels.settle_ties(score_HC, ids_HC, order_HC, *own)
            ids_NK[self._numbers[rows]] = ids_HC[:, : self._k]

"""Searches the lists of an inverted-file index for many queries at once, with matrix products.

An index of compressed keys looks up a table per query, key and code byte. For a bulk of queries it is several times
faster to decode each list once and multiply it with all queries that visit it; a threshold per query then lets few
scores through. The neighbours are those of the index itself: a decoded key has the same distance.

Shapes: N queries, P lists a query visits, M keys of a list, D width, H hits.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.low_precision import LOW_GROUP, Int8Keys, Int8Queries, low_scores
from fairseq.memory.index.places import places, true_places
from fairseq.memory.threads import map_in_threads

_BLOCK_SCORES = 4 << 20  # 16 MB: larger blocks leave the processor's cache between the passes over them
_MAX_GROUP = 16
_MAX_PENDING = 16 << 20  # hits held before all but the k best of each query are dropped


class Lists(Protocol):
    """The inverted lists of an index whose score is ``query . key + offset``."""

    def visited(self, query_ND: Tensor) -> Tensor:
        """int64 (N, P): the lists each query visits, nearest first; -1 for none."""
        ...

    def ids(self, number: int) -> Tensor:
        """int64 (M,): rows of the store in one list."""
        ...

    def decoded(self, number: int) -> Tensor:
        """float32 (M, D + 1): the keys of one list, each with its offset behind it."""
        ...

    def low(self, number: int, queries: Int8Queries) -> Int8Keys:
        """The keys of one list in 8 bits, for these queries."""
        ...

    def products(self, query_ND: Tensor, row_H: Tensor, keys_MD: Tensor, col_H: Tensor) -> Tensor:
        """``query_ND[row] . keys_MD[col]`` for H pairs, (H,)."""
        ...

    def use_one_thread(self) -> None:
        """Called in each thread that scans: whatever the lists compute there must start no more threads."""
        ...


@dataclass(frozen=True)
class _Hits:
    """Scores that reached their query's threshold, flat."""

    query_H: Tensor
    ids_H: Tensor
    scores_H: Tensor


def bulk_search(lists: Lists, query_ND: Tensor, k: int, *, low_precision: bool) -> tuple[Tensor, Tensor]:
    """The k best keys of the visited lists, best first: ids (N, k), -1 where fewer were found, and scores (N, k).

    Args:
        query_ND: float32, scaled so that ``lists`` gives the score.
        low_precision: pass over most scores in 8-bit integers, whose error is bounded; the result is the same.
    """
    visited_NP = lists.visited(query_ND)
    count = len(query_ND)
    search = _Search(lists, torch.cat([query_ND, query_ND.new_ones(count, 1)], 1), k, low_precision)
    hits: list[_Hits] = []
    pending = 0
    # The nearest list holds most of the neighbours: after it few scores of the others reach a query's threshold.
    for ranks, scan in ((slice(0, 1), search.scan_nearest), (slice(1, None), search.scan_others)):
        for found in map_in_threads(scan, _by_list(visited_NP[:, ranks]), lists.use_one_thread):
            hits += found
            pending += sum(len(part.ids_H) for part in found)
            if pending > _MAX_PENDING + 2 * count * k:
                hits = [_flat(*_best(hits, count, k))]
                pending = len(hits[0].ids_H)
    return _best(hits, count, k)


def _by_list(visited_NP: Tensor) -> list[tuple[int, Tensor]]:
    """Each list that is visited, with its visitors."""
    if not visited_NP.numel():
        return []
    flat = visited_NP.reshape(-1)
    order = flat.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(flat[order], return_counts=True)
    visitors = torch.split(torch.div(order, visited_NP.shape[1], rounding_mode="floor"), counts.tolist())
    tasks = [(number, query_Q) for number, query_Q in zip(numbers.tolist(), visitors) if number >= 0]
    # The most work first, so that no thread is left alone with a long one.
    return sorted(tasks, key=lambda task: -len(task[1]))


class _Search:
    """What the scans of one bulk share. A list is scanned by one thread."""

    def __init__(self, lists: Lists, query_ND: Tensor, k: int, low_precision: bool) -> None:
        self._lists, self._query_ND, self._k = lists, query_ND, k
        self._threshold_N = query_ND.new_full((len(query_ND),), -torch.inf)
        self._low = Int8Queries(query_ND) if low_precision else None
        self._of_thread = threading.local()

    def scan_nearest(self, task: tuple[int, Tensor]) -> list[_Hits]:
        """Scan a list for the queries that it is the nearest of; gives them their threshold."""
        return self._scan(*task, None, raises=True)

    def scan_others(self, task: tuple[int, Tensor]) -> list[_Hits]:
        """Scan a list for queries that have their threshold from their nearest list."""
        return self._scan(*task, self._low, raises=False)

    def _scan(self, number: int, query_Q: Tensor, low: Int8Queries | None, *, raises: bool) -> list[_Hits]:
        ids_M = self._lists.ids(number)
        if not len(ids_M):
            return []
        keys_MD = self._lists.decoded(number)
        low_keys = self._lists.low(number, low) if low else None
        hits = []
        for part in torch.split(query_Q, max(1, _BLOCK_SCORES // (len(ids_M) + LOW_GROUP))):
            threshold_N = self._threshold_N[part]
            open_N = torch.isneginf(threshold_N)
            # A query without a threshold (its nearest list was short) needs true scores to get one.
            if low is None or low_keys is None or open_N.any():
                row, col = self._reaching(part, keys_MD, threshold_N, open_N, raises=raises)
                lowest_N = torch.full_like(threshold_N, -torch.inf)
            else:
                low_NM = self._buffer(len(part), len(low_keys.low_MD)).view(torch.int32)
                row, col = _low_reaching(low_NM, low_scores(low, part, low_keys, threshold_N, low_NM), len(ids_M))
                lowest_N = threshold_N
            # A matrix product rounds as its shape has it; these do not, so that a bulk of any size scores the same.
            query_H = part[row]
            scores_H = self._lists.products(self._query_ND, query_H, keys_MD, col)
            true = true_places(scores_H >= lowest_N[row])
            hits.append(_Hits(query_H[true], ids_M[col[true]], scores_H[true]))
        return hits

    def _reaching(
        self, part: Tensor, keys_MD: Tensor, threshold_N: Tensor, open_N: Tensor, *, raises: bool
    ) -> tuple[Tensor, Tensor]:
        """Row and column of the scores that reach their query's threshold, which ``open_N`` have yet to get.

        The maxima of groups of columns are compared first: a pass for the maxima is cheap, one that lists all that
        reach a threshold is not.
        """
        scores_NM = self._buffer(len(part), len(keys_MD))
        torch.mm(self._query_ND[part], keys_MD.T, out=scores_NM)
        size = scores_NM.shape[1]
        group = max(1, min(_MAX_GROUP, size // (4 * self._k)))
        cols = size // group
        grouped_NGC = scores_NM[:, : group * cols].view(len(part), group, cols)
        best_NC = grouped_NGC.amax(1)
        if open_N.any() and cols >= self._k:
            # k groups reach this value, so at least k scores do.
            threshold_N = best_NC.topk(self._k, dim=1, sorted=False).values.amin(1).maximum(threshold_N)
            if raises:
                self._threshold_N[part] = threshold_N
        row, col = places(best_NC >= threshold_N[:, None])
        hit, step = places(grouped_NGC.transpose(1, 2)[row, col] >= threshold_N[row, None])
        row, at = row[hit], step * cols + col[hit]
        if group * cols < size:
            more_row, more_at = places(scores_NM[:, group * cols :] >= threshold_N[:, None])
            row, at = torch.cat([row, more_row]), torch.cat([at, more_at + group * cols])
        return row, at

    def _buffer(self, rows: int, cols: int) -> Tensor:
        """A matrix in memory kept by the thread: fresh memory for each block costs more than the arithmetic in it."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = self._query_ND.new_empty(_BLOCK_SCORES)
        buffer: Tensor = self._of_thread.buffer
        return buffer[: rows * cols].view(rows, cols) if rows * cols <= len(buffer) else buffer.new_empty(rows, cols)


def _low_reaching(low_NM: Tensor, low_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the 8-bit scores that reach their row's threshold; columns from ``size`` on mean nothing.

    As in ``_reaching``, groups first; here neighbouring columns are a group, whose scores share a line of the cache.
    """
    low_HG = low_NM.view(-1, LOW_GROUP)
    row, col = places(low_HG.amax(1).view(len(low_NM), -1) >= low_N[:, None])
    inside_HG = low_HG.index_select(0, row * (low_NM.shape[1] // LOW_GROUP) + col)
    hit, step = places(inside_HG >= low_N[row, None])
    row, at = row[hit], col[hit] * LOW_GROUP + step
    real = true_places(at < size)
    return row[real], at[real]


def _flat(ids_NK: Tensor, scores_NK: Tensor) -> _Hits:
    query_H, rank_H = (ids_NK >= 0).nonzero(as_tuple=True)
    return _Hits(query_H, ids_NK[query_H, rank_H], scores_NK[query_H, rank_H])


def _best(hits: list[_Hits], count: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best hits of each query."""
    ids_NK = torch.full((count, k), -1, dtype=torch.int64)
    scores_NK = torch.full((count, k), -torch.inf)
    if not hits:
        return ids_NK, scores_NK
    query_H, ids_H, scores_H = (
        torch.cat([getattr(part, name) for part in hits]) for name in ("query_H", "ids_H", "scores_H")
    )
    # One sort by (query, score): a float's bits, with those of a negative one turned round, order as the float does.
    bits_H = scores_H.view(torch.int32).long()
    falling_H = 0x7FFFFFFF - torch.where(bits_H < 0, bits_H ^ 0x7FFFFFFF, bits_H)
    # Equal scores are ordered by row, so that a bulk of any size orders them the same.
    order_H = (falling_H << 16) | (ids_H & 0xFFFF)

    def put(first: int) -> None:
        mine = true_places((query_H >= first) & (query_H < first + step))
        query = query_H[mine] - first
        # NumPy sorts integers with vector instructions, several times faster than torch.
        order = torch.from_numpy(np.argsort(((query << 48) | order_H[mine]).numpy()))
        mine, query = mine[order], query[order]
        counts = torch.bincount(query, minlength=step)
        rank = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
        keep = true_places(rank < k)
        mine, place = mine[keep], (query[keep] + first) * k + rank[keep]
        ids_NK.view(-1).scatter_(0, place, ids_H[mine])
        scores_NK.view(-1).scatter_(0, place, scores_H[mine])

    step = min(-(-count // torch.get_num_threads()), 1 << 15)
    for _ in map_in_threads(put, range(0, count, step)):
        pass
    return ids_NK, scores_NK

"""Exact search over the keys themselves: no index file, and the oracle that other indexes are measured by.

The keys are streamed once for as many queries as memory allows. Approximate scores with a bounded error (see
``filters``) meet a threshold of each query that rises as keys go by, so that few survive; the survivors are scored
again in float32.

Shapes: N queries, Q queries of a group, M keys of a block, C candidates a query may hold, H hits, K neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.files import Array
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.faiss_index import has_fast_int8, pair_products
from fairseq.memory.index.filters import GROUP, Block, Filter, FloatFilter, Int8Filter
from fairseq.memory.index.places import places, true_places
from fairseq.memory.rows import Rows
from fairseq.memory.similarity import normalized
from fairseq.memory.threads import map_in_threads
from fairseq.memory.types import Metric, Neighbors

DEFAULT_MEMORY = 2 << 30
_BLOCK_BYTES = 32 << 20  # of keys in float32
_SCORE_BYTES = 8 << 20  # of a group of queries with a block: larger ones leave the processor's cache
_FEW_QUERIES = 32  # reading the keys costs more than their products: nothing is gained by rounding them first
_SAMPLE_ROWS = 4096


class ExactIndex:
    """Compares every key with every query, by passes over blocks of the (memory-mapped) keys."""

    def __init__(self, keys: Rows | Array, metric: Metric = Metric.L2, *, memory_bytes: int = DEFAULT_MEMORY) -> None:
        """Args.

        keys: (rows, dim), any floating type; read as they are needed.
        memory_bytes: what a search may take, beside its results; queries are searched in as many bulks as need be.
        """
        self.keys = Rows.of(keys)
        self.metric = metric
        self.memory_bytes = memory_bytes

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query, best first; of equally close ones the lower row."""
        check_k(k, len(self))
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu().contiguous()
        query_ND = normalized(query_ND) if self.metric is Metric.COS else query_ND
        ids_NK = torch.empty(len(query_ND), k, dtype=torch.int64)
        scores_NK = torch.empty(len(query_ND), k)
        bulk = max(1, self.memory_bytes // (_bytes_per_candidate() * _capacity(k) + 8 * self.dim))
        for start in range(0, len(query_ND), bulk):
            part = slice(start, start + bulk)
            _Search(self.keys, self.metric, query_ND[part], k).run(ids_NK[part], scores_NK[part])
        return Neighbors(ids_NK, scores_NK)


def _capacity(k: int) -> int:
    """Candidates a query may hold before they are sifted."""
    return max(4 * k, 256)


def _bytes_per_candidate() -> int:
    return 3 * 12  # the low bound and the row, and as much again twice while they are scored and sorted


class _Search:
    """One bulk of queries against all keys."""

    def __init__(self, keys: Rows, metric: Metric, query_ND: Tensor, k: int) -> None:
        self.keys, self.metric, self.query_ND, self.k = keys, metric, query_ND, k
        rows = max(GROUP, _BLOCK_BYTES // (4 * max(1, keys.shape[1])) // GROUP * GROUP)
        self.blocks = [slice(start, min(start + rows, len(keys))) for start in range(0, len(keys), rows)]
        self.filter = _filter(keys, metric, query_ND)
        size = max(1, min(_SCORE_BYTES // (4 * rows), -(-len(query_ND) // torch.get_num_threads())))
        self.groups = [
            _Group(slice(start, min(start + size, len(query_ND))), k, self._true_scores)
            for start in range(0, len(query_ND), size)
        ]

    def run(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best rows and their scores."""
        if not len(self.query_ND):
            return
        ahead = max(1, torch.get_num_threads())
        for first in range(0, len(self.blocks), ahead):
            rows = self.blocks[first : first + ahead]
            blocks = list(zip(rows, map_in_threads(self._block, rows)))
            for _ in map_in_threads(functools.partial(self._scan, blocks), self.groups):
                pass
        for group in self.groups:
            group.sift()
        self._finish(ids_NK, scores_NK)

    def _block(self, rows: slice) -> Block:
        keys_MD = self.keys.block(rows.start, rows.stop)
        return self.filter.block(normalized(keys_MD.float()) if self.metric is Metric.COS else keys_MD)

    def _scan(self, blocks: list[tuple[slice, Block]], group: _Group) -> None:
        for rows, block in blocks:
            group.take(self.filter, block, rows.start)

    def _true_scores(self, row_H: Tensor, ids_H: Tensor) -> Tensor:
        """Of pairs of a query and a key, as the metric has them."""
        order = torch.from_numpy(np.argsort(ids_H.numpy()))  # each key is read once
        true_H = torch.empty(len(order))
        parts = torch.split(order, max(1, -(-len(order) // (4 * torch.get_num_threads()))))

        def score(at: Tensor) -> None:
            true_H[at] = pair_products(self.metric, self.query_ND, row_H[at], self.keys, ids_H[at])

        for _ in map_in_threads(score, parts):
            pass
        return true_H

    def _finish(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Score what is left and keep the k best."""
        held = [group.held() for group in self.groups]
        row_H = torch.cat([row + group.rows.start for group, (row, _, _) in zip(self.groups, held)])
        true_H = self._true_scores(row_H, torch.cat([ids for _, _, ids in held]))
        true = torch.split(true_H, [len(row) for row, _, _ in held])

        def put(task: tuple[_Group, Tensor, Tensor, Tensor]) -> None:
            group, row, col, scores = task
            ids_NK[group.rows], scores_NK[group.rows] = group.best(row, col, scores)

        for _ in map_in_threads(put, [(g, row, col, x) for g, (row, col, _), x in zip(self.groups, held, true)]):
            pass


def _filter(keys: Rows, metric: Metric, query_ND: Tensor) -> Filter:
    """The fastest way to pass over the keys here."""
    step = max(1, len(keys) // _SAMPLE_ROWS)
    sample_MD = keys.take(torch.arange(0, len(keys), step)[:_SAMPLE_ROWS])
    sample_MD = normalized(sample_MD) if metric is Metric.COS else sample_MD
    many, with_offset = len(query_ND) >= _FEW_QUERIES, metric is Metric.L2
    if many and torch.cpu._is_amx_tile_supported():
        return FloatFilter(query_ND, sample_MD, with_offset=with_offset, dtype=torch.bfloat16)
    if many and has_fast_int8():
        return Int8Filter(query_ND, sample_MD, with_offset=with_offset)
    return FloatFilter(query_ND, sample_MD, with_offset=with_offset)


class _Group:
    """Some queries and the candidates they hold. Of each candidate a bound is known that its score is not below."""

    def __init__(self, rows: slice, k: int, true_scores: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.rows, self.k = rows, k
        self._true_scores = true_scores
        count, capacity = rows.stop - rows.start, _capacity(k)
        self.low_QC = torch.full((count, capacity), -torch.inf)
        self.ids_QC = torch.empty(count, capacity, dtype=torch.int64)
        self.filled_Q = torch.zeros(count, dtype=torch.int64)
        self.threshold_Q = torch.full((count,), -torch.inf)
        """k keys at least reach this."""
        self.width_Q = torch.zeros(count)
        """How far the scores of candidates may be above their low bounds."""
        self._buffer: Tensor | None = None

    def __len__(self) -> int:
        return len(self.filled_Q)

    def take(self, by: Filter, block: Block, first_row: int) -> None:
        """Take in what of a block could be among the k best."""
        size = len(block.low_MD)
        if self._buffer is None or self._buffer.numel() < len(self) * size:
            self._buffer = torch.empty(len(self) * size, dtype=by.dtype)
        raw_QM = self._buffer[: len(self) * size].view(len(self), size)
        by.scores(block, self.rows, raw_QM)
        scale, shift_Q, margin_Q = by.bounds(block, self.rows)
        torch.maximum(self.width_Q, 2.0 * margin_Q, out=self.width_Q)
        open_Q = torch.isneginf(self.threshold_Q)
        if bool(open_Q.any()) and block.num_rows >= self.k:
            best_QK = raw_QM[:, : block.num_rows].topk(self.k, dim=1, sorted=False).values
            known_Q = best_QK.amin(1).double() * scale + (shift_Q - margin_Q)
            self.threshold_Q = torch.maximum(self.threshold_Q, known_Q.float())
        row, col = _reaching(raw_QM, _raw(self.threshold_Q, scale, shift_Q, margin_Q, by.dtype), block.num_rows)
        low_H = raw_QM.view(-1).index_select(0, row * size + col).double() * scale
        low_H = (low_H + (shift_Q - margin_Q).index_select(0, row)).float()
        self._add(row, col + first_row, low_H)

    def _add(self, row_H: Tensor, ids_H: Tensor, low_H: Tensor) -> None:
        """Put hits, ordered by row, behind those that are there."""
        count_Q = torch.bincount(row_H, minlength=len(self))
        if int((self.filled_Q + count_Q).amax()) > self.low_QC.shape[1]:
            self.sift()
            reach = low_H + self.width_Q[row_H] >= self.threshold_Q[row_H]
            if not bool(reach.all()):
                self._add(row_H[reach], ids_H[reach], low_H[reach])
                return
            needed = int((self.filled_Q + count_Q).amax())
            if needed > self.low_QC.shape[1]:
                self._settle()
                self._widen(int((self.filled_Q + count_Q).amax()))
        place_H = torch.arange(len(row_H)) + (self.filled_Q - (count_Q.cumsum(0) - count_Q)).index_select(0, row_H)
        place_H += row_H * self.low_QC.shape[1]
        self.low_QC.view(-1)[place_H] = low_H
        self.ids_QC.view(-1)[place_H] = ids_H
        self.filled_Q += count_Q

    def sift(self) -> None:
        """Raise the thresholds to what k candidates are known to reach, and drop candidates that cannot."""
        most = int(self.filled_Q.amax())
        if most >= self.k:
            known_Q = self.low_QC[:, :most].topk(self.k, dim=1, sorted=False).values.amin(1)
            self.threshold_Q = torch.maximum(self.threshold_Q, known_Q)
        self._keep(self.low_QC[:, :most] + self.width_Q[:, None] >= self.threshold_Q[:, None])

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, place and row of every candidate; those of a query in the order of their rows."""
        row, col = places(torch.arange(self.low_QC.shape[1]) < self.filled_Q[:, None])
        return row, col, self.ids_QC[row, col]

    def best(self, row: Tensor, col: Tensor, true_H: Tensor) -> tuple[Tensor, Tensor]:
        """The k best candidates, given the true scores of all: their rows and scores, best first."""
        true_QC, order_QK = self._order(row, col, true_H)
        return self.ids_QC.gather(1, order_QK), true_QC.gather(1, order_QK)

    def _order(self, row: Tensor, col: Tensor, true_H: Tensor) -> tuple[Tensor, Tensor]:
        true_QC = torch.full((len(self), int(self.filled_Q.amax())), -torch.inf)
        true_QC[row, col] = true_H
        # Stable: of equals the lower row comes first.
        return true_QC, true_QC.argsort(dim=1, descending=True, stable=True)[:, : self.k]

    def _keep(self, keep_QC: Tensor) -> None:
        """Keep some candidates, moved to the front in their order."""
        most = keep_QC.shape[1]
        keep_QC &= torch.arange(most) < self.filled_Q[:, None]
        row, col = places(keep_QC)
        low_H, ids_H = self.low_QC[row, col], self.ids_QC[row, col]
        self.low_QC[:, :most] = -torch.inf
        self.filled_Q.zero_()
        self._add(row, ids_H, low_H)

    def _settle(self) -> None:
        """Score all candidates (too many are close to each other) and keep the k best of each query."""
        row, col, ids_H = self.held()
        true_QC, order_QK = self._order(row, col, self._true_scores(row + self.rows.start, ids_H))
        self._keep(torch.zeros_like(true_QC, dtype=torch.bool).scatter_(1, order_QK, True))

    def _widen(self, needed: int) -> None:
        """Make room for as many candidates per query."""
        if needed <= self.low_QC.shape[1]:
            return
        low_QC = self.low_QC.new_full((len(self), needed), -torch.inf)
        ids_QC = self.ids_QC.new_empty((len(self), needed))
        low_QC[:, : self.low_QC.shape[1]], ids_QC[:, : self.ids_QC.shape[1]] = self.low_QC, self.ids_QC
        self.low_QC, self.ids_QC = low_QC, ids_QC


def _raw(threshold_Q: Tensor, scale: float, shift_Q: Tensor, margin_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """The approximate score that every key at the threshold reaches."""
    raw_Q = (threshold_Q.double() - margin_Q - shift_Q) / scale
    if dtype is torch.int32:
        return raw_Q.floor_().clamp_(-(2.0**30), 2.0**30).to(dtype)
    rounded_Q = raw_Q.to(dtype)
    below_Q = torch.nextafter(rounded_Q, torch.full_like(rounded_Q, -torch.inf))
    return torch.where(rounded_Q.double() > raw_Q, below_Q, rounded_Q)


def _reaching(raw_QM: Tensor, threshold_Q: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Query and column of the scores that reach their query's threshold; columns from ``num_rows`` on mean nothing.

    The maxima of groups of columns are compared first: a pass for the maxima is cheap, one that lists all that reach
    a threshold is not.
    """
    raw_HG = raw_QM.view(-1, GROUP)
    row, col = places(raw_HG.amax(1).view(len(raw_QM), -1) >= threshold_Q[:, None])
    inside_HG = raw_HG.index_select(0, row * (raw_QM.shape[1] // GROUP) + col)
    hit, step = places(inside_HG >= threshold_Q.index_select(0, row)[:, None])
    row, at = row[hit], col[hit] * GROUP + step
    real = true_places(at < num_rows)
    return row[real], at[real]

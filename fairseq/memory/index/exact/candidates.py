"""The candidates of exact search: keys that could still be among a query's k best, and how they are scored again.

Shapes: N queries, Q queries of a group, M keys, C candidates a query may hold, K neighbours, D width.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.candidates.room import capacity
from fairseq.memory.index.exact import kernels
from fairseq.memory.index.ops.bounded_scores import KeyBlock, RoundedQueries, kernel_rows
from fairseq.memory.index.ops.kernels import LOWEST
from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric
from fairseq.runtime.threads import ThreadBuffer, run_in_threads

_PAIR_BYTES = 8 << 20  # of keys that are scored at a time, by each thread


class TrueScores:
    """The metric's scores in float32, each summed by itself: no other pair in a search changes a bit of it."""

    def __init__(self, keys: ChunkedArray, metric: Metric, query_ND: Tensor) -> None:
        """Take float32 queries, for the cosine of length one."""
        self.keys, self.metric, self.query_ND = keys, metric, query_ND
        self.by_distance = metric is Metric.L2

    def rows(self, rows: slice) -> Array:
        """Keys as they are scored; see ``prepare``."""
        return self.prepare(self.keys.block(rows.start, rows.stop))

    def of(self, query: int, ids_H: Array) -> Array:
        """Scores of one query with some keys, (H,)."""
        scores_H, keys_MD, row_H = np.empty(len(ids_H), np.float32), self._whole_keys, ids_H
        if keys_MD is None:
            keys_MD, row_H = self.prepare(self.keys.take(ids_H)), np.arange(len(ids_H))
        kernels.score_some(self.query_ND[query].numpy(), keys_MD, row_H, self.by_distance, scores_H)
        return scores_H

    @functools.cached_property
    def _whole_keys(self) -> Array | None:
        """All keys as they are scored, where that is how they lie in memory."""
        if self.metric is Metric.COS or len(self.keys.chunks) > 1 or self.keys.exceeds_ram:
            return None
        rows_MD = kernel_rows(self.keys.block(0, 1))
        chunk = self.keys.chunks[0]
        if rows_MD.itemsize != chunk.itemsize or not chunk.flags.c_contiguous:
            return None
        return chunk.view(rows_MD.dtype)

    def pairs(self, row_H: Array, ids_H: Array) -> Array:
        """Scores of pairs of a query and a key, (H,); each key is read once, in the order of the rows."""
        order_H = np.argsort(ids_H, kind="stable")
        row_H, (unique_U, count_U) = row_H[order_H], np.unique(ids_H, return_counts=True)
        edge_U = np.concatenate([[0], np.cumsum(count_U)])
        sorted_H = np.empty(len(ids_H), np.float32)
        step = max(1, _PAIR_BYTES // (4 * max(1, self.query_ND.shape[1])))

        def score(first: int) -> None:
            past = min(first + step, len(unique_U))
            keys_MD = self.prepare(self.keys.take(unique_U[first:past]))
            col_H = np.repeat(np.arange(past - first), count_U[first:past])
            part = slice(edge_U[first], edge_U[past])
            kernels.score_pairs(self.query_ND.numpy(), row_H[part], keys_MD, col_H, self.by_distance, sorted_H[part])

        run_in_threads(score, range(0, len(unique_U), step))
        scores_H = np.empty(len(ids_H), np.float32)
        scores_H[order_H] = sorted_H
        return scores_H

    def write_best(self, ids_NC: Array, which_Q: Array, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best candidates of some queries, best first, of equals the lower row, and their scores.

        Args:
            ids_NC: rows of each query's candidates, ascending, -1 after the last.
            which_Q: numbers of the queries.
        """
        ids_QC = ids_NC[which_Q]
        row_H, place_H = np.nonzero(ids_QC >= 0)
        scores_QC = np.full(ids_QC.shape, np.nan, np.float32)
        scores_QC[row_H, place_H] = self.pairs(which_Q[row_H], ids_QC[row_H, place_H])
        place_QK = argsort_descending(scores_QC, ids_NK.shape[1])
        ids_NK[which_Q] = torch.from_numpy(np.take_along_axis(ids_QC, place_QK, 1))
        scores_NK[which_Q] = torch.from_numpy(np.take_along_axis(scores_QC, place_QK, 1))

    def prepare(self, keys_MD: Tensor) -> Array:
        """Keys of any floating type as they are scored, as ``kernel_rows`` makes them."""
        return kernel_rows(normalized(keys_MD.float()) if self.metric is Metric.COS else keys_MD)


class CandidateGroup:
    """Some queries and the candidates they hold, each with a lower bound of its score."""

    def __init__(self, rows: slice, k: int, queries: RoundedQueries, scores: TrueScores) -> None:
        """Args.

        rows: which of the queries.
        queries: approximate scores, with their bounds.
        scores: scores candidates where too many are close to each other.
        """
        self.rows, self._k, self._queries, self._scores = rows, k, queries, scores
        count = rows.stop - rows.start
        self._candidates = kernels.BoundedCandidates(
            lower_QC=np.empty((count, capacity(k)), np.float32),
            ids_QC=np.empty((count, capacity(k)), np.int64),
            filled_Q=np.zeros(count, np.int64),
            threshold_Q=np.full(count, LOWEST, np.float32),
            width_Q=np.zeros(count, np.float32),
        )
        self._start_Q = np.full(count, LOWEST, np.float32)
        self._true_QC = np.empty((0, 0), np.float32)
        self._bound_Q: Array = self._candidates.threshold_Q

    def __len__(self) -> int:
        return len(self._candidates.filled_Q)

    def expect(self, sample: KeyBlock, rank: int, buffer: ThreadBuffer) -> None:
        """Pass over keys that do not reach what so many of a sample do; see ``disappointed``."""
        raw = self._products(sample, buffer)
        about_Q4 = self._queries.about_N4[self.rows]
        kernels.reached_in_sample(raw, about_Q4, tuple(sample.about_5M), rank, self._start_Q)
        np.maximum(self._start_Q, LOWEST, out=self._start_Q)
        self._candidates.threshold_Q[:] = self._start_Q

    def disappointed(self) -> Array:
        """Numbers of the queries of which fewer than k keys reached what was expected: they are searched without that.

        To be asked after ``select_first``.
        """
        few_Q = (self._bound_Q < self._start_Q) | (self._candidates.filled_Q < self._k)
        number: Array = np.flatnonzero(few_Q) + self.rows.start
        return number

    def _products(self, block: KeyBlock, buffer: ThreadBuffer) -> Array:
        raw_QM = buffer(len(self), block.columns)
        self._queries.raw_scores(block, self.rows, raw_QM)
        products: Array = (raw_QM.float() if raw_QM.is_floating_point() else raw_QM).numpy()
        return products

    def take(self, block: KeyBlock, first_row: int, buffer: ThreadBuffer, keys_MD: Array | None = None) -> None:
        """Collect the keys of a block, whose first has this row number, that could be among the k best.

        Args:
            keys_MD: as they are scored, for groups that score them at once.
        """
        queries, about = self._queries, tuple(block.about_5M)
        about_Q4 = np.zeros((len(self) + queries.products.tile_rows, 4), np.float32)
        about_Q4[len(self) :, 3] = np.nan  # which nothing reaches, not even infinity
        about_Q4[: len(self)] = queries.about_N4[self.rows]
        about_Q4[: len(self), 3] = self._candidates.threshold_Q
        last = (about, first_row, self._k, tuple(self._candidates))
        if queries.products.is_interleaved:
            rows_QE = queries.rows[self.rows.start : self.rows.stop + queries.products.tile_rows].numpy()
            collect = functools.partial(
                kernels.collector(queries.products.name), rows_QE, about_Q4, block.keys.numpy(), block.start_M, *last
            )
        else:
            collect = functools.partial(kernels.collect_products, self._products(block, buffer), about_Q4, *last)
        key, query, full = collect(0, 0)
        while full >= 0:
            self._settle(full)
            about_Q4[full, 3] = self._candidates.threshold_Q[full]
            key, query, full = collect(key, query)

    def _settle(self, query: int) -> None:
        """Score the candidates of a query (too many are close to each other) and keep its k best."""
        filled = self._candidates.filled_Q[query]
        true_C = self._scores.of(self.rows.start + query, self._candidates.ids_QC[query, :filled])
        place_K = np.sort(argsort_descending(true_C[None], self._k)[0])
        for array_QC in (self._candidates.lower_QC, self._candidates.ids_QC):
            array_QC[query, : len(place_K)] = array_QC[query, place_K]
        self._candidates.filled_Q[query] = len(place_K)
        at = self.rows.start + query
        least = self._queries.least_of(torch.from_numpy(true_C[place_K]).amin()[None], slice(at, at + 1))
        self._candidates.threshold_Q[query] = max(self._candidates.threshold_Q[query], float(least))

    def select_first(self) -> None:
        """Prune for the last time; ``score`` then scores the k of each query with the highest bounds."""
        kernels.prune_all(tuple(self._candidates), self._k)
        self._true_QC = np.full((len(self), max(self._k, int(self._candidates.filled_Q.max()))), np.nan, np.float32)
        self._bound_Q = np.empty(len(self), np.float32)
        kernels.reached_by(self._candidates.lower_QC, self._candidates.filled_Q, self._k, self._bound_Q)

    def select_remaining(self) -> None:
        """``score`` then scores those that could be better than the k-th of what is scored."""
        true_Q = np.empty(len(self), np.float32)
        kernels.reached_by(self._true_QC, self._candidates.filled_Q, self._k, true_Q)
        self._bound_Q = self._queries.least_of(torch.from_numpy(true_Q), self.rows).numpy() - self._candidates.width_Q

    def score(self, keys_MD: Array, first_row: int) -> None:
        """Score the selected candidates among some keys."""
        query_QD = self._scores.query_ND[self.rows].numpy()
        by_distance, candidates = self._scores.by_distance, tuple(self._candidates)
        kernels.score_candidates(query_QD, keys_MD, first_row, by_distance, self._bound_Q, candidates, self._true_QC)

    def write_best(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best of what is scored, best first; of equals the lower row."""
        place_QK = argsort_descending(self._true_QC, self._k)
        ids_QK = np.take_along_axis(self._candidates.ids_QC, place_QK, 1)
        scores_QK = np.take_along_axis(self._true_QC, place_QK, 1)
        # Where no score could be told, as with keys that are not numbers, there may be fewer candidates than k.
        is_none_QK = np.isnan(scores_QK)
        ids_QK[is_none_QK], scores_QK[is_none_QK] = -1, -np.inf
        ids_NK[self.rows], scores_NK[self.rows] = torch.from_numpy(ids_QK), torch.from_numpy(scores_QK)

"""The candidates of exact search: keys that could still be among a query's k best, and how they are scored again.

Shapes: N queries, Q queries of a group, M keys, C candidates a query may hold, K neighbours, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.exact import kernels
from fairseq.memory.index.ops.candidate_room import capacity
from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric

# Scores computed in two ways differ by a few units in the seventh place of what they are sums of.
_ROUNDING = 2e-6


class TrueScores:
    """The metric's scores in float32, each summed by itself: no other pair in a search changes a bit of it."""

    def __init__(self, keys: ChunkedArray, metric: Metric, query_ND: Tensor) -> None:
        """Take float32 queries, for the cosine of length one."""
        self.keys, self.metric, self.query_ND = keys, metric, query_ND
        self.by_distance = metric is Metric.L2

    def rows(self, rows: slice) -> Array:
        """Keys as they are scored, float32."""
        return self._prepare(self.keys.block(rows.start, rows.stop))

    def of(self, query: int, ids_H: Array) -> Array:
        """Scores of one query with some keys, (H,)."""
        scores_H = np.empty(len(ids_H), np.float32)
        row_H, at_H = np.full(len(ids_H), query), np.arange(len(ids_H))
        keys_HD = self._prepare(self.keys.take(ids_H))
        kernels.score_pairs(self.query_ND.numpy(), row_H, keys_HD, at_H, self.by_distance, scores_H)
        return scores_H

    def as_filtered(self, true_Q: Tensor, rows: slice) -> Tensor:
        """Lower bounds, in the scores of a filter (``bounded_scores``), for keys of these true scores."""
        if not self.by_distance:
            return true_Q - _ROUNDING * true_Q.abs()
        length_Q = self.query_ND[rows].square().sum(1)
        return 0.5 * (true_Q + length_Q) - _ROUNDING * (length_Q + true_Q.abs())

    def _prepare(self, keys_MD: Tensor) -> Array:
        rows_MD = keys_MD.float()
        prepare: Array = (normalized(rows_MD) if self.metric is Metric.COS else rows_MD).contiguous().numpy()
        return prepare


class CandidateGroup:
    """Some queries and the candidates they hold, each with a lower bound of its score."""

    def __init__(self, rows: slice, k: int, scores: TrueScores) -> None:
        """Args.

        rows: which of the queries.
        scores: scores candidates where too many are close to each other.
        """
        self.rows, self._k, self._scores = rows, k, scores
        count = rows.stop - rows.start
        self._lower_QC = np.empty((count, capacity(k)), np.float32)
        self._ids_QC = np.empty((count, capacity(k)), np.int64)
        self._filled_Q = np.zeros(count, np.int64)
        self._threshold_Q = np.full(count, -np.inf, np.float32)  # k keys at least reach this
        self._width_Q = np.zeros(count, np.float32)  # how far scores may be above their low bounds
        self._true_QC = np.empty((0, 0), np.float32)
        self._bound_Q = self._threshold_Q

    def __len__(self) -> int:
        return len(self._filled_Q)

    def take(
        self, raw_QM: Tensor, num_rows: int, first_row: int, scale: float, shift_Q: Tensor, margin_Q: Tensor
    ) -> None:
        """Collect the keys of a block that could be among the k best; see ``Filter.bounds``.

        Args:
            num_rows: columns that mean something.
            first_row: row of the first one.
        """
        integral = not raw_QM.is_floating_point()
        raw = (raw_QM if integral else raw_QM.float()).numpy()
        bounds = (shift_Q.double().numpy(), margin_Q.double().numpy())
        held = (self._lower_QC, self._ids_QC, self._filled_Q, self._threshold_Q, self._width_Q)
        query = column = 0
        while query < len(self):
            query, column = kernels.collect_candidates(
                raw, num_rows, first_row, scale, *bounds, integral, self._k, *held, query, column
            )
            if query < len(self):
                self._settle(query)

    def _settle(self, query: int) -> None:
        """Score the candidates of a query (too many are close to each other) and keep its k best."""
        filled = self._filled_Q[query]
        true_C = self._scores.of(self.rows.start + query, self._ids_QC[query, :filled])
        place_K = np.sort(argsort_descending(true_C[None], self._k)[0])
        for held_QC in (self._lower_QC, self._ids_QC):
            held_QC[query, : len(place_K)] = held_QC[query, place_K]
        self._filled_Q[query] = len(place_K)
        at = self.rows.start + query
        least = self._scores.as_filtered(torch.from_numpy(true_C[place_K]).amin()[None], slice(at, at + 1))
        self._threshold_Q[query] = max(self._threshold_Q[query], float(least))

    def select_first(self) -> None:
        """Prune for the last time; ``score`` then scores the k of each query with the highest bounds."""
        kernels.prune_all(self._lower_QC, self._ids_QC, self._filled_Q, self._k, self._threshold_Q, self._width_Q)
        self._true_QC = np.full((len(self), max(1, int(self._filled_Q.max()))), np.nan, np.float32)
        self._bound_Q = np.empty(len(self), np.float32)
        kernels.reached_by(self._lower_QC, self._filled_Q, self._k, self._bound_Q)

    def select_remaining(self) -> None:
        """``score`` then scores those that could be better than the k-th of what is scored."""
        true_Q = np.empty(len(self), np.float32)
        kernels.reached_by(self._true_QC, self._filled_Q, self._k, true_Q)
        self._bound_Q = self._scores.as_filtered(torch.from_numpy(true_Q), self.rows).numpy() - self._width_Q

    def score(self, keys_MD: Array, first_row: int) -> None:
        """Score the selected candidates among some keys."""
        query_QD = self._scores.query_ND[self.rows].numpy()
        held = (self._lower_QC, self._ids_QC, self._filled_Q, self._true_QC)
        kernels.score_candidates(query_QD, keys_MD, first_row, self._scores.by_distance, self._bound_Q, *held)

    def write_best(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best of what is scored, best first; of equals the lower row."""
        place_QK = argsort_descending(self._true_QC, self._k)
        ids_NK[self.rows] = torch.from_numpy(np.take_along_axis(self._ids_QC, place_QK, 1))
        scores_NK[self.rows] = torch.from_numpy(np.take_along_axis(self._true_QC, place_QK, 1))

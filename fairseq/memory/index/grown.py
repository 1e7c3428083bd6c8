"""An index over a store that has grown since: the index itself, and exact search of the rows that came later."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.base import Index, check_k
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.ops.merging import best_of
from fairseq.memory.types import Array, Metric, Neighbors


class GrownIndex:
    """An index over the first rows of a store, and its later rows, whose keys are compared one by one.

    Scores of the first rows are the index's, of compressed keys; those of the later ones are exact.
    """

    def __init__(self, first: Index, later: ExactIndex) -> None:
        """Put both together. Raises: ValueError when their width or metric differ."""
        if (first.dim, first.metric) != (later.dim, later.metric):
            raise ValueError(
                f"an index of width {first.dim} and metric {first.metric.value} cannot be searched with rows of width "
                f"{later.dim} by {later.metric.value}; build it again over all rows"
            )
        self._first, self._later = first, later
        self._start = len(first)
        self.streams_keys = first.streams_keys

    def __len__(self) -> int:
        return self._start + len(self._later)

    def __str__(self) -> str:
        return f"{self._first} and {len(self._later)} later rows"

    @property
    def metric(self) -> Metric:
        """The measure of closeness."""
        return self._first.metric

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self._first.dim

    @property
    def deleted(self) -> Array:
        """int64, ascending: rows that are never found."""
        return np.concatenate([self._first.deleted, self._later.deleted + self._start])

    def bulk_pays(self, num_queries: int) -> bool:
        """See ``Index``."""
        return self._first.bulk_pays(num_queries) or self._later.bulk_pays(num_queries)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query, best first. Raises: ValueError if k is larger than the index."""
        check_k(k, len(self) - len(self.deleted))
        parts = []
        for index, start in ((self._first, 0), (self._later, self._start)):
            most = min(k, len(index) - len(index.deleted))
            if most:
                found = index.search(query_ND, most)
                parts.append((torch.where(found.ids_NK < 0, -1, found.ids_NK + start), found.scores_NK))
        return Neighbors(*best_of(parts, k))

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query, float32 (N, M); -inf where the id is -1."""
        is_later_NM = ids_NM >= self._start
        first_NM = self._first.score_rows(query_ND, torch.where(is_later_NM, -1, ids_NM))
        later_NM = self._later.score_rows(query_ND, torch.where(is_later_NM, ids_NM - self._start, -1))
        return torch.where(is_later_NM, later_NM, first_NM)

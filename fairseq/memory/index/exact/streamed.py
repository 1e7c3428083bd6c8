"""Candidates of exact search in a store larger than memory: every key passes by once.

A second pass that scores the candidates again would read the whole store again, and single rows cost a disk as much as
ten rows in order. So what the filter lets through is scored in float32 while its block is at hand. That also raises the
thresholds sooner: the k-th score replaces the k-th lower bound.

Shapes: Q queries of a group, M keys of a block, C candidates a query may hold, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.candidates.room import capacity
from fairseq.memory.index.exact import streamed_kernels
from fairseq.memory.index.exact.candidates import CandidateGroup, TrueScores
from fairseq.memory.index.exact.kernels import CHUNK_KEYS
from fairseq.memory.index.ops.bounded_scores import KeyBlock, RoundedQueries
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.types import Array
from fairseq.runtime.threads import ThreadBuffer

_RISEN_SHARE = 0.125  # of the queries: with fewer risen thresholds the filter's are left as they are for a while


class StreamedGroup(CandidateGroup):
    """Some queries and the best keys so far, with their scores."""

    def __init__(self, rows: slice, k: int, queries: RoundedQueries, scores: TrueScores, block_rows: int) -> None:
        """Args.

        block_rows: the most rows of a block; see ``CandidateGroup`` for the others.
        """
        super().__init__(rows, k, queries, scores)
        count = len(self)
        # Room for a whole block, of which only what is collected is touched.
        self._candidates = self._candidates._replace(
            lower_QC=np.empty((count, block_rows + CHUNK_KEYS + GROUP), np.float32),
            ids_QC=np.empty((count, block_rows + CHUNK_KEYS + GROUP), np.int64),
        )
        self._scored = streamed_kernels.ScoredCandidates(
            score_QC=np.empty((count, capacity(k)), np.float32),
            ids_QC=np.empty((count, capacity(k)), np.int64),
            filled_Q=np.zeros(count, np.int64),
            threshold_Q=np.full(count, -np.inf, np.float32),
        )
        self._risen = 0

    def take(self, block: KeyBlock, first_row: int, buffer: ThreadBuffer, keys_MD: Array | None = None) -> None:
        """Collect what may be near, as ``CandidateGroup`` does, and score it; the keys must be given."""
        assert keys_MD is not None, "keys are scored as they pass by"
        super().take(block, first_row, buffer)
        scores = self._scores
        self._risen += streamed_kernels.score_collected(
            scores.query_ND[self.rows].numpy(),
            keys_MD,
            first_row,
            scores.by_distance,
            self._k,
            tuple(self._candidates),
            tuple(self._scored),
        )
        if self._risen > _RISEN_SHARE * len(self):
            self._risen = 0
            least_Q = self._queries.least_of(torch.from_numpy(self._scored.threshold_Q), self.rows).numpy()
            np.fmax(self._candidates.threshold_Q, least_Q, out=self._candidates.threshold_Q)

    def disappointed(self) -> Array:
        """See ``CandidateGroup``; to be asked at any time after the last block."""
        least_Q = self._queries.least_of(torch.from_numpy(self._scored.threshold_Q), self.rows).numpy()
        number: Array = np.flatnonzero((least_Q < self._start_Q) | (self._scored.filled_Q < self._k)) + self.rows.start
        return number

    def write_best(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best, best first; of equals the lower row."""
        score_QC, ids_QC, filled_Q, _ = self._scored
        most = max(self._k, int(filled_Q.max(initial=0)))
        score_QC[:, :most][np.arange(most) >= filled_Q[:, None]] = np.nan
        self._true_QC, self._candidates = score_QC[:, :most], self._candidates._replace(ids_QC=ids_QC[:, :most])
        super().write_best(ids_NK, scores_NK)

"""Readers of memories that offer candidates: kNN-LM and TRIME."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.combiners.base import Combiner
from fairseq.memory.sources.base import Source
from fairseq.memory.types import Candidates, Neighbors, ScoredPositions

if TYPE_CHECKING:
    from fairseq.memory.gnn.neighbors import SplitNeighbors
    from fairseq.memory.sources.external import ExternalMemory

IntArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CandidateReader:
    """Looks candidates up in a source and combines them with the model's scores.

    With ``Interpolation`` this is kNN-LM (arXiv 1911.00172), with ``JointNormalization`` TRIME (arXiv 2205.12674).
    """

    combine: Combiner
    source: Source | None = None
    """The external memory; None when all memories are of the text and their sums come with the positions."""
    record: Callable[[ScoredPositions, Candidates], None] | None = None
    """Is given the positions and their candidates before they are combined."""

    @property
    def needs_keys(self) -> bool:
        """Keys are the queries of the external memory."""
        return self.source is not None

    @property
    def reads_alone(self) -> bool:
        """Whether a position is read without those before it."""
        return True

    @property
    def num_searched(self) -> int | None:
        """None: every position is searched."""
        return None

    def with_record(self, record: Callable[[ScoredPositions, Candidates], None]) -> CandidateReader:
        """The same reader, whose candidates are recorded."""
        return dataclasses.replace(self, record=record)

    def logp(self, scored: ScoredPositions) -> Tensor:
        """See ``MemoryReader``."""
        candidates = self._candidates(scored)
        if self.record is not None and candidates is not None:
            self.record(scored, candidates)
        return self.combine(scored.logp_N, scored.norm_N, candidates, scored.target_N, scored.text_sums)

    def _candidates(self, scored: ScoredPositions) -> Candidates | None:
        return self.source.lookup(scored.keys) if self.source is not None else None


@dataclass(frozen=True, kw_only=True)
class KeptNeighborsReader(CandidateReader):
    """Takes neighbours that were searched before, whichever keys found them, and compares them by a store's keys."""

    source: ExternalMemory
    neighbors: SplitNeighbors
    starts_B: IntArray
    """Place in the text of each block's first scored token."""
    rows_of: Callable[[IntArray], IntArray]
    """Rows of the file of tokens at some places of the text, -1 where there are none."""

    @property
    def reads_alone(self) -> bool:
        """False: a position's place in its block tells which neighbours it has."""
        return False

    def _candidates(self, scored: ScoredPositions) -> Candidates:
        ids_NK = self.ids(scored.block_N.numpy())
        return self.source.candidates(
            Neighbors(ids_NK, self.source.score_rows(scored.keys, ids_NK)), scored.keys.device
        )

    def ids(self, block_N: IntArray) -> Tensor:
        """Neighbours of scored positions, int64 (N, K), given their blocks; a block's positions follow each other."""
        begins_N = np.r_[True, block_N[1:] != block_N[:-1]]
        first_N = np.maximum.accumulate(np.where(begins_N, np.arange(len(block_N)), 0))
        row_N = torch.from_numpy(self.rows_of(self.starts_B[block_N] + np.arange(len(block_N)) - first_N))
        ids_NK = torch.full((len(row_N), self.source.k), -1)
        ids_NK[row_N >= 0] = self.neighbors.take(row_N[row_N >= 0], self.source.k)
        return ids_NK

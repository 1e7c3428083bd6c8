"""Readers of memories that offer candidates: kNN-LM and TRIME."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fairseq.memory.combiners.base import Combiner
from fairseq.memory.sources.base import Source
from fairseq.memory.types import Candidates, ScoredPositions


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
    def num_searched(self) -> int | None:
        """None: every position is searched."""
        return None

    def with_record(self, record: Callable[[ScoredPositions, Candidates], None]) -> CandidateReader:
        """The same reader, whose candidates are recorded."""
        return dataclasses.replace(self, record=record)

    def logp(self, scored: ScoredPositions) -> Tensor:
        """See ``MemoryReader``."""
        candidates = self.source.lookup(scored.keys) if self.source is not None else None
        if self.record is not None:
            assert candidates is not None, "without an external memory nothing is retrieved"
            self.record(scored, candidates)
        return self.combine(scored.logp_N, scored.norm_N, candidates, scored.target_N, scored.text_sums)

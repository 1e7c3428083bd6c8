"""References scored instead of generated: --score-reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.generation.sequence_generator import Hypothesis
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.generation.next_token import NeighborMemory
    from fairseq.generation.save_retrieval import KeptNeighbors
    from fairseq.memory.combiners.base import Combiner
    from fairseq.memory.types import Candidates
    from fairseq.models.transformer_lm import TransformerLanguageModel


class ReferenceScorer:
    """The reference of each sentence as its one hypothesis."""

    def __init__(
        self,
        models: list[TransformerLanguageModel],
        memory: NeighborMemory | None,
        combine: Combiner | None,
    ) -> None:
        """Args.

        memory: searched for all positions of a batch at once.
        combine: joins its candidates with the model.
        """
        device = next(models[0].parameters()).device
        self.scorer = SequenceScorer(models, key_tap=memory.key_tap if memory else None, device=device)
        self.memory, self.combine = memory, combine
        self.kept: KeptNeighbors | None = None
        """Takes the neighbours that are found, and has those of an earlier command."""

    def score(self, batch: LMBatch) -> Iterator[Hypothesis]:
        """One hypothesis for each row of the batch; its score is the mean over its tokens."""
        target_N, logp_N = self._logp(batch)
        lengths = batch.scored_BT.sum(1).tolist()
        for tokens, logp in zip(torch.split(target_N, lengths), torch.split(logp_N, lengths)):
            yield Hypothesis(tokens, logp, float(logp.mean()))

    def _logp(self, batch: LMBatch) -> tuple[Tensor, Tensor]:
        """Every scored target and its log-probability, (N,)."""
        saved = None if self.kept is None else self.kept.next_saved(int(batch.scored_BT.sum()))
        if saved is not None:
            assert self.combine is not None
            return saved.target_N, self.combine(saved.lm_logp_N, saved.lm_norm_N, saved.found, saved.target_N)
        scored = self.scorer.score(batch)
        if self.memory is None:
            return scored.target_N, scored.logp_N
        assert scored.key_ND is not None
        assert self.combine is not None
        found = self._found(scored.key_ND)
        if self.kept is not None:
            self.kept.append(scored, found)
        return scored.target_N, self.combine(scored.logp_N, scored.norm_N, found, scored.target_N)

    def _found(self, key_ND: Tensor) -> Candidates:
        assert self.memory is not None
        found = self.memory.find(key_ND)
        return found if self.memory.facts is None else self.memory.facts.with_model(found, key_ND)

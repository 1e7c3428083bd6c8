"""References scored instead of generated: --score-reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fairseq.generation.sequence_generator import Hypothesis
from fairseq.sequence_scorer import SequenceScorer

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.generation.next_token import NeighborMemory
    from fairseq.memory.combiners.base import Combiner
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

    def score(self, batch: LMBatch) -> Iterator[Hypothesis]:
        """One hypothesis for each row of the batch; its score is the mean over its tokens."""
        found = self.scorer.score(batch)
        logp_N = found.logp_N
        if self.memory is not None:
            assert found.key_ND is not None
            assert self.combine is not None
            near = self.memory.find(found.key_ND)
            if self.memory.facts is not None:
                near = self.memory.facts.with_model(near, found.key_ND)
            logp_N = self.combine(logp_N, found.norm_N, near, found.target_N)
        lengths = batch.scored_BT.sum(1).tolist()
        for tokens, logp in zip(torch.split(found.target_N, lengths), torch.split(logp_N, lengths)):
            yield Hypothesis(tokens, logp, float(logp.mean()))

"""Cross-entropy of the next token under a softmax over the whole vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fairseq.criterions.base import Criterion, Loss, scored, wide_sum

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.models.base import LanguageModel


class CrossEntropy(Criterion):
    """-log p of each scored target, summed."""

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError for an adaptive softmax, which has a criterion of its own."""
        if model.has_adaptive_softmax:
            raise ValueError(
                "--criterion cross_entropy is for a plain softmax and the model has an adaptive one; "
                "use --criterion adaptive_loss (or a model without --adaptive-softmax-cutoff)"
            )

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """See the class."""
        return self.loss(target_nll(model, batch), batch)


def target_nll(model: LanguageModel, batch: LMBatch) -> Tensor:
    """-log p of the scored targets, summed, in nats; gradients flow to the model."""
    hidden_ND, target_N = scored(model(batch.tokens_BT, **batch.source), batch)
    logp_N: Tensor = model.target_logp(hidden_ND, target_N)[0]
    return -wide_sum(logp_N)

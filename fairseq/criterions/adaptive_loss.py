"""Cross-entropy of the next token under an adaptive softmax (arXiv 1609.04309)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairseq.criterions.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from fairseq.models.base import LanguageModel


class AdaptiveLoss(CrossEntropy):
    """-log p of each scored target, summed: the head's share times the share within the target's cluster."""

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError for a model without adaptive softmax."""
        if not model.has_adaptive_softmax:
            raise ValueError(
                "--criterion adaptive_loss needs a model with an adaptive softmax: give --adaptive-softmax-cutoff "
                "(such as 20000,60000), or use --criterion cross_entropy"
            )

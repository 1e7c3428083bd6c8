"""Cross-entropy with label smoothing (arXiv 1512.00567, sec. 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fairseq.criterions.base import Criterion, Loss, scored, wide_sum
from fairseq.criterions.configs import LabelSmoothingConfig
from fairseq.fairseq_names import lazy

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
from fairseq.models.base import LanguageModel


class LabelSmoothedCrossEntropy(Criterion):
    """The target keeps 1 - e of its probability and each of the V - 1 other types gets e / (V - 1).

    This is how fairseq 0.12 shares e out; older versions gave each of all V types e / V.
    """

    config: LabelSmoothingConfig

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError for an adaptive softmax."""
        if model.has_adaptive_softmax:
            raise ValueError(
                "--criterion label_smoothed_cross_entropy needs the probability of every type at every position, "
                "which an adaptive softmax exists to avoid; use --criterion adaptive_loss (no smoothing), "
                "or a model without --adaptive-softmax-cutoff"
            )

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """The smoothed loss; the plain one is reported as ``nll_loss``, and perplexity is computed from that."""
        hidden_ND, target_N = scored(model(batch.tokens_BT, **batch.source), batch)
        logp_NV = model.vocab_logp(hidden_ND)
        total, nll = smoothed_nll(logp_NV, target_N, self.config.label_smoothing)
        correct = {"n_correct": (logp_NV.argmax(1) == target_N).sum()} if self.config.report_accuracy else {}
        return self.loss(total, batch, nll_loss=nll, **correct)


def smoothed_nll(logp_NV: Tensor, target_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy against smoothed and against plain targets, in nats."""
    nll = -wide_sum(logp_NV.gather(1, target_N[:, None]))
    if smoothing == 0:
        return nll, nll
    other = smoothing / (logp_NV.shape[1] - 1)
    return (1 - smoothing - other) * nll - other * wide_sum(logp_NV), nll


__getattr__, __dir__ = lazy(__name__)

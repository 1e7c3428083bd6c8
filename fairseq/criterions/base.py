"""The interface of training losses: batch and model in, a summed loss and figures to report out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq.config import build
from fairseq.criterions import CRITERIONS
from fairseq.criterions.configs import CriterionConfig
from fairseq.metrics.training import Figures, loss_figures
from fairseq.registry import lookup

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.models.base import LanguageModel
    from fairseq.models.outputs import LMOutput


@dataclass(frozen=True)
class Loss:
    """The loss of one batch. Sums, never means, so that batches, processes and padding can be put together freely."""

    sum: Tensor
    """Differentiable, in nats, over the scored positions."""
    sample_size: int
    """Divisor of the gradients once all batches of an update are summed: tokens, or blocks."""
    log: dict[str, float | Tensor]
    """Sums to report: ``loss`` and others ending so in nats, ``sample_size``, ``ntokens``, ``nsentences``.

    Tensors stay on their device until they are read, so that a training step need not wait for the GPU."""


class Criterion:
    """A training loss; subclasses give :meth:`__call__` and may reject a model in :meth:`check`."""

    train_subset: str = "train"
    """Split that is trained on."""

    def __init__(self, config: CriterionConfig) -> None:
        self.config = config

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError if this loss cannot train that model."""

    def attach(self, task: Any) -> None:
        """The task that is trained on, before the first batch."""

    def figures(self, sums: Mapping[str, float]) -> Figures:
        """Figures to report of what :class:`Loss` logs, summed over batches and processes."""
        return loss_figures(sums)

    def start_epoch(self, epoch: int) -> None:
        """Training starts or resumes in this epoch; the first is 1."""

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """The loss of the scored positions of a batch (there may be none: the sum is then a 0 with a gradient)."""
        raise NotImplementedError

    def sample_size(self, batch: LMBatch) -> int:
        """What a batch adds to the divisor of an update's gradients: tokens, or blocks."""
        return batch.tokens_BT.shape[0] if self.config.sentence_avg else batch.num_scored

    def loss(self, total: Tensor, batch: LMBatch, **more: Tensor) -> Loss:
        """Put a summed loss, further sums to report and the counts of the batch together."""
        num_blocks = batch.tokens_BT.shape[0]
        sample_size = self.sample_size(batch)
        log: dict[str, float | Tensor] = {"loss": total.detach()}
        log |= {name: value.detach() for name, value in more.items()}
        log |= {"sample_size": sample_size, "ntokens": batch.num_scored, "nsentences": num_blocks}
        return Loss(total, sample_size, log)


def scored(out: LMOutput, batch: LMBatch) -> tuple[Tensor, Tensor]:
    """The hidden states and targets of the positions that count, (N, D) and (N,); a view when all of them do."""
    if batch.num_scored == batch.scored_BT.numel():
        return out.hidden_BTD.flatten(0, 1), batch.target_BT.flatten()
    return out.hidden_BTD[batch.scored_BT], batch.target_BT[batch.scored_BT]


def wide_sum(terms: Tensor) -> Tensor:
    """Sum in float32 at least: thousands of half-precision terms would lose digits."""
    return terms.sum(dtype=torch.promote_types(terms.dtype, torch.float32))


def build_criterion(name: str, given: Mapping[str, Any], model: LanguageModel, task: Any = None) -> Criterion:
    """Make the loss of ``--criterion NAME`` from the flags the user gave, for a model and its task.

    Raises: ValueError for an unknown name, a setting out of range, or a model the loss cannot train.
    """
    entry = lookup(CRITERIONS, name, "--criterion")
    criterion: Criterion = entry.load()(build(entry.config, given))
    criterion.check(model)
    criterion.train_subset = str(given.get("train_subset") or criterion.train_subset)
    if task is not None:
        criterion.attach(task)
    return criterion

"""One update of training, and one pass of validation, over any number of processes."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fairseq.criterions.base import Criterion, Loss
from fairseq.data.types import LMBatch
from fairseq.metrics.training import StepSums
from fairseq.modules.transformer_layer import TransformerLayer
from fairseq.optim import set_lr
from fairseq.optim.configs import OptimizationConfig
from fairseq.runtime.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fairseq.models.base import LanguageModel
    from fairseq.optim.lr_schedulers import LRSchedule
    from fairseq.runtime.strategies.whole import WholeOnEveryProcess

logger = logging.getLogger(__name__)

_MICRO_BATCHES_PER_UPDATE = 1 << 16  # more than anybody accumulates; keeps seeds of different updates apart


class LossModule(nn.Module):
    """Model and criterion as one module, so that data-parallel hooks see the whole path to the loss."""

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, kind: type[LMBatch], *parts: Any) -> tuple[Tensor, dict[str, Any]]:
        """Loss of one batch, handed over in parts because Fabric cannot rebuild frozen values."""
        loss: Loss = self.criterion(cast("LanguageModel", self.model), kind(*parts))
        return loss.sum, loss.log


def sum_logs(
    logs: Iterable[dict[str, Any]], over_ranks: Callable[[list[float]], Sequence[float]] = lambda values: values
) -> StepSums:
    """Add up what a criterion reported for each batch. ``over_ranks`` adds the values of other processes."""
    sums: dict[str, Any] = defaultdict(float)
    for log in logs:
        sums["num_batches"] += 1 if log["nsentences"] else 0
        for name, value in log.items():
            sums[name] += value.double() if isinstance(value, Tensor) else value
    names = sorted(sums)
    total = dict(zip(names, over_ranks([float(sums[name]) for name in names])))
    return StepSums(
        loss=total.pop("loss"),
        sample_size=total.pop("sample_size"),
        num_tokens=total.pop("ntokens"),
        num_sentences=total.pop("nsentences"),
        num_batches=total.pop("num_batches"),
        log=total,
    )


class Trainer:
    """Holds what changes while training: weights, optimizer, schedule and the count of updates."""

    def __init__(
        self,
        layout: WholeOnEveryProcess,
        model: nn.Module,
        criterion: Criterion,
        make_optimizer: Callable[[], torch.optim.Optimizer],
        schedule: LRSchedule,
        optimization: OptimizationConfig,
        seed: int,
    ) -> None:
        """Args.

        layout: where tensors lie; it takes over the model.
        make_optimizer: called when the parameters are what they will be.
        """
        self.layout = layout
        self.fabric = layout.fabric
        self.model = model
        self.criterion = criterion
        self.schedule = schedule
        self.optimization = optimization
        self.seed = seed
        self.num_updates = 0
        units = [part for part in model.modules() if isinstance(part, TransformerLayer)]
        layout.set_up(LossModule(model, criterion), units, make_optimizer)
        self.wrapped, self.optimizer = layout.wrapped, layout.optimizer
        set_lr(self.optimizer, schedule.lr)

    def train_step(self, batches: list[LMBatch]) -> StepSums:
        """One update from this rank's batches.

        Dropout is seeded by update and by the batch's place in the update, so that a continued run, or the same
        update on another number of processes, draws the same masks.
        """
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        logs = []
        factor = self._factor(self._known_sample_size(batches)) if self.layout.scales_loss else 1.0
        for place, batch in enumerate(batches):
            self._seed(place * self.fabric.world_size + self.fabric.global_rank)
            last = place == len(batches) - 1
            with self.layout.micro_batch(last=last):
                loss, log = self._loss(batch)
                self.layout.backward(loss, factor)
            logs.append(log)
        sums = self._sum(logs)
        limit = self.optimization.clip_norm if self.optimization.clip_norm > 0 else float("inf")
        norm = self.layout.step(self._factor(sums.sample_size), limit)
        self.num_updates += 1
        set_lr(self.optimizer, self.schedule.step_update(self.num_updates))
        return replace(sums, norm=norm, clipped=0 < self.optimization.clip_norm < norm)

    def valid_pass(self, batches: Iterable[LMBatch]) -> StepSums:
        """The criterion's sums over a validation split and all ranks."""
        self.wrapped.eval()
        with self.layout.evaluating():
            return self._sum([self._loss(batch)[1] for batch in batches])

    def _loss(self, batch: LMBatch) -> tuple[Tensor, dict[str, Any]]:
        result: tuple[Tensor, dict[str, Any]] = self.wrapped(type(batch), *batch.to(self.fabric.device).parts())
        return result

    def _sum(self, logs: list[dict[str, Any]]) -> StepSums:
        """Add up what the criterion reported, over batches and ranks; one look at the device for all figures."""
        return sum_logs(logs, lambda values: sum_over_ranks(self.fabric, values))

    def _known_sample_size(self, batches: list[LMBatch]) -> float:
        """Divisor of an update's gradients over all ranks, before the update."""
        return sum_over_ranks(self.fabric, [float(sum(map(self.criterion.sample_size, batches)))])[0]

    def _factor(self, sample_size: float) -> float:
        """What turns the ranks' mean sum into the mean per token."""
        return self.fabric.world_size / max(sample_size, 1.0)

    def _seed(self, place: int) -> None:
        torch.manual_seed((self.seed * (1 << 40) + self.num_updates * _MICRO_BATCHES_PER_UPDATE + place) % (1 << 63))

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.schedule.lr)

    def start_epoch(self, epoch: int) -> None:
        """Let the criterion know which epoch starts or resumes."""
        self.criterion.start_epoch(epoch)

    def end_epoch(self, epoch: int, figure: float | None) -> None:
        """Let the schedule know that an epoch is over and what validation gave."""
        set_lr(self.optimizer, self.schedule.step_epoch(epoch, figure))

    def state_dict(self, with_optimizer: bool = True) -> dict[str, Any]:
        """Optimizer, schedule and update count as plain types and tensors, with spread ones as they lie."""
        return {
            "optimizer": self.layout.optimizer_state() if with_optimizer else None,
            "scheduler": self.schedule.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any], *, reset_optimizer: bool, reset_schedule: bool) -> None:
        """Resume from a saved state.

        Raises: ValueError when the optimizer's state is missing or belongs to another optimizer.
        """
        if not reset_optimizer:
            if state["optimizer"] is None:
                raise ValueError(
                    "the checkpoint holds no optimizer state, so training cannot resume exactly; "
                    "give --reset-optimizer to start its state afresh"
                )
            try:
                self.layout.load_optimizer_state(state["optimizer"])
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the checkpoint's optimizer state does not fit this optimizer ({error}); "
                    "give the same --optimizer, or --reset-optimizer"
                ) from error
        if not reset_schedule:
            self.schedule.load_state_dict(state["scheduler"])
            self.num_updates = state["num_updates"]
            set_lr(self.optimizer, self.schedule.step_update(self.num_updates))

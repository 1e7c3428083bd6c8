"""Learning rate schedules: the rate as a function of the number of updates and epochs done.

``step_update(n)`` is called after update n (n = 0 before the first), and its result is used for update n + 1.
``step_epoch(e, loss)`` is called after epoch e (counted from 1) with that epoch's validation figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fairseq.config import build
from fairseq.optim import LR_SCHEDULERS
from fairseq.optim import configs as c
from fairseq.registry import lookup


def _linear(start: float, end: float, done: int, total: int) -> float:
    return start + (end - start) * done / total


def _only_one(lrs: tuple[float, ...], scheduler: str) -> float:
    if len(lrs) > 1:
        given = ",".join(map(str, lrs))
        raise ValueError(
            f"--lr {given}: the {scheduler} schedule takes one rate; --lr-scheduler fixed takes one per epoch"
        )
    return lrs[0]


class LRSchedule:
    """A schedule that is a pure function of the updates and epochs done; subclasses give :meth:`lr_at`."""

    def __init__(self, config: Any, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0) -> None:
        if not lrs or min(lrs) < 0:
            raise ValueError(f"--lr needs at least one number, none below 0; got {lrs}")
        self.config, self.lrs, self.max_update, self.min_lr = config, tuple(lrs), max_update, min_lr
        self.num_updates, self.num_epochs = 0, 0

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """The rate once so many updates and whole epochs are done."""
        raise NotImplementedError

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return self.lr_at(self.num_updates, self.num_epochs)

    @property
    def has_floor(self) -> bool:
        """True if ``--min-lr`` is the schedule's lowest rate (fairseq 0.12), not where training stops (0.9)."""
        return False

    @property
    def is_warming_up(self) -> bool:
        """True while the rate is warming up; ``--stop-min-lr`` ends no run before that is over."""
        return bool(self.num_updates < getattr(self.config, "warmup_updates", 0))

    def step_update(self, num_updates: int) -> float:
        """Note that so many updates are done; returns the rate of the next one."""
        self.num_updates = num_updates
        return self.lr

    def step_epoch(self, epoch: int, val_loss: float | None = None) -> float:
        """Note that an epoch is done and what validation gave (None: no validation); returns the rate from now on."""
        self.num_epochs = epoch
        return self.lr

    def state_dict(self) -> dict[str, Any]:
        """All that changes during training, as plain types."""
        return {"num_updates": self.num_updates, "num_epochs": self.num_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.num_updates, self.num_epochs = state["num_updates"], state["num_epochs"]


def build_lr_scheduler(
    name: str, given: Mapping[str, Any], lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
) -> LRSchedule:
    """Make the schedule of ``--lr-scheduler NAME`` from the flags the user gave.

    Raises: ValueError for an unknown name or settings that make no schedule.
    """
    entry = lookup(LR_SCHEDULERS, name, "--lr-scheduler")
    schedule: LRSchedule = entry.load()(build(entry.config, given), lrs, max_update, min_lr)
    return schedule


class FixedSchedule(LRSchedule):
    """``--lr`` gives the rate of each epoch, the last one from then on; ``--force-anneal`` shrinks it later."""

    config: c.FixedConfig

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class; the n-th update of a warm-up of W takes n / W of the rate."""
        epoch, anneal = num_epochs + 1, self.config.force_anneal
        if anneal is None or epoch < anneal:
            lr = self.lrs[min(epoch, len(self.lrs)) - 1]
        else:
            lr = self.lrs[-1] * self.config.lr_shrink ** (epoch + 1 - anneal)
        if num_updates < self.config.warmup_updates:
            return lr * (num_updates + 1) / self.config.warmup_updates
        return lr


class CosineSchedule(LRSchedule):
    """Linear warm-up to the highest rate, then half a cosine down to the lowest; again in each later period.

    Period i (from 0) lasts ``lr_period_updates * t_mult ** i`` updates, and both rates are multiplied by
    ``lr_shrink ** i`` in it. Source: arXiv 1608.03983, eq. 5.
    """

    config: c.CosineConfig

    def __init__(
        self, config: c.CosineConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        lr = _only_one(lrs, "cosine")
        self.low, self.high = (max(min_lr, 0.0), lr) if config.max_lr is None else (lr, config.max_lr)
        if self.high <= self.low:
            lowest, highest = ("--min-lr", "--lr") if config.max_lr is None else ("--lr", "--max-lr")
            raise ValueError(f"{highest} {self.high} must be larger than {lowest} {self.low}, the lowest rate")
        self.start = config.warmup_init_lr if config.warmup_init_lr >= 0 else self.low
        self.period = config.lr_period_updates if config.lr_period_updates > 0 else max_update - config.warmup_updates
        if self.period <= 0:
            raise ValueError(
                f"the cosine schedule has no period: give --lr-period-updates, or a --max-update ({max_update}) "
                f"larger than --warmup-updates ({config.warmup_updates})"
            )

    @property
    def has_floor(self) -> bool:
        """True without ``--max-lr``, which fairseq 0.9 requires and 0.12 does not have."""
        return self.config.max_lr is None

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class."""
        if num_updates < self.config.warmup_updates:
            return _linear(self.start, self.high, num_updates, self.config.warmup_updates)
        done, length, shrink = float(num_updates - self.config.warmup_updates), float(self.period), 1.0
        if self.config.t_mult == 1:
            shrink = self.config.lr_shrink ** (done // length)
            done %= length
        while done >= length:
            done, length, shrink = done - length, length * self.config.t_mult, shrink * self.config.lr_shrink
        return shrink * (self.low + (self.high - self.low) * (1 + math.cos(math.pi * done / length)) / 2)


class InverseSqrtSchedule(LRSchedule):
    """Linear warm-up to ``--lr``, then ``lr * sqrt(warmup_updates / num_updates)`` (arXiv 1706.03762, sec. 5.3)."""

    config: c.InverseSqrtConfig

    def __init__(
        self, config: c.InverseSqrtConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        self.high = _only_one(lrs, "inverse_sqrt")
        default = 0.0 if config.warmup_updates > 0 else self.high
        self.start = config.warmup_init_lr if config.warmup_init_lr >= 0 else default

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class; without warm-up the formula is that of a warm-up of one update."""
        warmup = self.config.warmup_updates
        if num_updates < warmup:
            return _linear(self.start, self.high, num_updates, warmup)
        return self.high * math.sqrt(max(warmup, 1) / max(num_updates, 1))


class PolynomialDecaySchedule(LRSchedule):
    """Linear warm-up from 0, then ``end + (lr - end) * (share of the updates left) ** power``."""

    config: c.PolynomialDecayConfig

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class; with several ``--lr`` each epoch has its own, until ``--force-anneal``."""
        epoch, anneal = num_epochs + 1, self.config.force_anneal
        if anneal is not None:
            epoch = max(min(epoch, anneal - 1), 1)
        lr, end = self.lrs[min(epoch, len(self.lrs)) - 1], self.config.end_learning_rate
        warmup, total = self.config.warmup_updates, self.config.total_num_update
        if num_updates < warmup:
            return lr * num_updates / warmup
        left = max(0.0, 1 - (num_updates - warmup) / (total - warmup))
        return end + (lr - end) * math.pow(left, self.config.power)


class PlateauSchedule(LRSchedule):
    """Linear warm-up, then ``--lr`` until the validation figure stops getting better; then it shrinks."""

    config: c.PlateauConfig

    def __init__(
        self, config: c.PlateauConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        import torch

        super().__init__(config, lrs, max_update, min_lr)
        self.high = _only_one(lrs, "reduce_lr_on_plateau")
        default = 0.0 if config.warmup_updates > 0 else self.high
        self.start = config.warmup_init_lr if config.warmup_init_lr >= 0 else default
        # torch's class holds the rate inside an optimizer; it gets one of its own, so that warm-up cannot touch it.
        self._holder = torch.optim.SGD([torch.zeros(())], lr=self.high)
        self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._holder,
            mode="max" if config.maximize_best_checkpoint_metric else "min",
            factor=config.lr_shrink,
            patience=config.lr_patience,
            threshold=config.lr_threshold,
        )

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """The rate after the warm-up does not depend on the counts but on what validation gave so far."""
        if num_updates < self.config.warmup_updates:
            return _linear(self.start, self.high, num_updates, self.config.warmup_updates)
        return float(self._holder.param_groups[0]["lr"])

    def step_epoch(self, epoch: int, val_loss: float | None = None) -> float:
        """Compare a validation figure with the best so far; figures during the warm-up do not count."""
        if val_loss is not None and self.num_updates >= self.config.warmup_updates:
            self._plateau.step(val_loss)
        return super().step_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that changes during training, as plain types."""
        plateau = self._plateau
        seen = {
            "best": float(plateau.best),
            "num_bad_epochs": plateau.num_bad_epochs,
            "lr": self._holder.param_groups[0]["lr"],
        }
        return super().state_dict() | seen

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        super().load_state_dict(state)
        self._plateau.best, self._plateau.num_bad_epochs = state["best"], state["num_bad_epochs"]
        self._holder.param_groups[0]["lr"] = state["lr"]


class TriStageSchedule(LRSchedule):
    """Linear warm-up to ``--lr``, constant, then exponential descent (arXiv 1904.08779, sec. 4.2)."""

    config: c.TriStageConfig

    def __init__(
        self, config: c.TriStageConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        self.high = _only_one(lrs, "tri_stage")
        self.warmup, self.hold, self.decay = config.warmup_steps, config.hold_steps, config.decay_steps
        if config.phase_ratio is not None:
            if max_update <= 0:
                raise ValueError(
                    "--phase-ratio gives shares of --max-update: give that too, or --warmup-steps and so on"
                )
            self.warmup, self.hold, self.decay = (int(max_update * share) for share in config.phase_ratio)
        if self.warmup + self.hold + self.decay == 0:
            raise ValueError("tri_stage has no update in any phase; give --phase-ratio, or --warmup-steps and so on")

    @property
    def is_warming_up(self) -> bool:
        """See the base class."""
        return self.num_updates < self.warmup

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class."""
        if num_updates < self.warmup:
            return _linear(self.config.init_lr_scale * self.high, self.high, num_updates, self.warmup)
        done = num_updates - self.warmup - self.hold
        if done < 0:
            return self.high
        share = done / self.decay if done <= self.decay and self.decay else 1.0
        return float(self.high * self.config.final_lr_scale**share)


class TriangularSchedule(LRSchedule):
    """Rises and falls linearly between ``--lr`` and ``--max-lr`` (arXiv 1506.01186, sec. 3)."""

    config: c.TriangularConfig

    def __init__(
        self, config: c.TriangularConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        self.low = _only_one(lrs, "triangular")
        if config.max_lr is None or config.max_lr <= self.low:
            raise ValueError(f"--max-lr {config.max_lr} must be larger than --lr {self.low}, the lowest rate; give one")
        self.high, self.half = config.max_lr, config.lr_period_updates // 2

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """See the class; period i shrinks the highest rate (and with --shrink-min the lowest) by lr_shrink ** i."""
        period, place = divmod(num_updates, 2 * self.half)
        shrink = self.config.lr_shrink**period
        low = self.low * shrink if self.config.shrink_min else self.low
        return float(low + (self.high * shrink - low) * (1 - abs(place / self.half - 1)))


class ManualSchedule(LRSchedule):
    """Rates by epoch or update from a table; before its first entry ``--lr``."""

    config: c.ManualConfig

    def __init__(
        self, config: c.ManualConfig, lrs: tuple[float, ...], max_update: int = 0, min_lr: float = -1.0
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        self.by_epoch, self.by_update = config.epoch2lr or {}, config.update2lr or {}
        first = self.by_epoch.get(1, self.by_update.get(1))
        self.first = _only_one(lrs, "manual") if first is None else first

    def lr_at(self, num_updates: int, num_epochs: int) -> float:
        """The entry of the largest number reached; updates go before epochs."""
        for table, number in ((self.by_update, num_updates), (self.by_epoch, num_epochs + 1)):
            reached = [key for key in table if key <= number]
            if reached:
                return float(table[max(reached)])
        return self.first

"""Optimizers and learning rate schedules in fairseq's form, as ours."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fairseq.compat.flags import config_of, namespace
from fairseq.optim import register_lr_scheduler as register_lr_scheduler
from fairseq.optim import set_lr
from fairseq.optim.lr_schedulers import LRSchedule
from fairseq.registry import Entry


class FairseqOptimizer:
    """An optimizer in fairseq's form: its ``__init__`` sets ``_optimizer`` to one of PyTorch's."""

    _optimizer: torch.optim.Optimizer

    def __init__(self, cfg: Any) -> None:
        self.cfg = self.args = cfg

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the optimizer's options to a parser."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """PyTorch's optimizer."""
        return self._optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Settings of PyTorch's optimizer, ``lr`` among them."""
        return {"lr": self.args.lr[0]}

    def get_lr(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate."""
        set_lr(self.optimizer, lr)


class LegacyFairseqOptimizer(FairseqOptimizer):
    """The same; fairseq separates options and dataclasses, here both are ``args`` and ``cfg``."""


class RateHolder(FairseqOptimizer):
    """The optimizer whose rate a schedule in fairseq's form sets; the trainer reads it from there."""

    def __init__(self, lr: float) -> None:
        super().__init__(None)
        self.rate = lr

    def get_lr(self) -> float:
        """The learning rate."""
        return self.rate

    def set_lr(self, lr: float) -> None:
        """Set the learning rate."""
        self.rate = float(lr)


class FairseqLRScheduler:
    """A schedule in fairseq's form: it sets the rate by ``self.optimizer.set_lr`` in ``step`` and ``step_update``."""

    def __init__(self, cfg: Any, optimizer: Any) -> None:
        self.cfg = self.args = cfg
        self.optimizer = optimizer
        self.best: float | None = None

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the schedule's options to a parser."""

    def state_dict(self) -> dict[str, Any]:
        """Its changing state, as plain types."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.best = state_dict["best"]

    def step_begin_epoch(self, epoch: int) -> None:
        """An epoch begins."""

    def step(self, epoch: int, val_loss: float | None = None) -> float | None:
        """An epoch is over."""
        if val_loss is not None:
            self.best = val_loss if self.best is None else min(self.best, val_loss)
        return None

    def step_update(self, num_updates: int) -> float:
        """So many updates are done; returns the rate of the next one."""
        return float(self.optimizer.get_lr())


class LegacyFairseqLRScheduler(FairseqLRScheduler):
    """The same; see :class:`LegacyFairseqOptimizer`."""


class FairseqFormSchedule(LRSchedule):
    """A schedule of ours around one in fairseq's form."""

    def __init__(
        self,
        kind: type[FairseqLRScheduler],
        config: Any,
        lrs: tuple[float, ...],
        max_update: int = 0,
        min_lr: float = -1.0,
    ) -> None:
        super().__init__(config, lrs, max_update, min_lr)
        self.holder = RateHolder(lrs[0])
        given = namespace(config, lr=list(lrs), max_update=max_update, min_lr=min_lr)
        self.inner = kind(given, self.holder)

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return self.holder.get_lr()

    def step_update(self, num_updates: int) -> float:
        """See the base class."""
        self.num_updates = num_updates
        self.inner.step_update(num_updates)
        return self.lr

    def step_epoch(self, epoch: int, val_loss: float | None = None) -> float:
        """See the base class."""
        self.num_epochs = epoch
        self.inner.step(epoch, val_loss)
        self.inner.step_begin_epoch(epoch + 1)
        return self.lr

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return super().state_dict() | {"inner": self.inner.state_dict(), "rate": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(state)
        self.inner.load_state_dict(state["inner"])
        self.holder.set_lr(state["rate"])


def _make_optimizer(kind: type[Any], params: list[torch.nn.Parameter], config: Any, lr: float) -> torch.optim.Optimizer:
    """PyTorch's optimizer in one of fairseq's form. Raises: ValueError when it has none, or steps in its own way."""
    made = kind(namespace(config, lr=[lr]), params)
    own = [name for name in ("step", "backward", "clip_grad_norm") if name in vars(kind)]
    if own or not isinstance(getattr(made, "_optimizer", None), torch.optim.Optimizer):
        what = f"has its own {own[0]}()" if own else "sets no _optimizer"
        raise ValueError(f"optimizer {kind.__name__} {what}; put the update into a torch.optim.Optimizer and set that")
    optimizer: torch.optim.Optimizer = made._optimizer
    return optimizer


def _require_kind(kind: type[Any], base: type, decorator: str) -> None:
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(
            f"{decorator}: {getattr(kind, '__name__', kind)} is no {base.__name__}; derive it from that, or give a "
            "config as second argument (docs/extending.md)"
        )


def optimizer_entry(kind: type[Any], dataclass: type | None) -> Entry:
    """An optimizer in fairseq's form as an entry of our table. Raises: ValueError for a class that is none."""
    _require_kind(kind, FairseqOptimizer, "register_optimizer")
    return Entry(config_of(kind, dataclass), functools.partial(_make_optimizer, kind))


def lr_scheduler_entry(kind: type[Any], dataclass: type | None) -> Entry:
    """A schedule in fairseq's form as an entry of our table. Raises: ValueError for a class that is none."""
    _require_kind(kind, FairseqLRScheduler, "register_lr_scheduler")
    return Entry(config_of(kind, dataclass), functools.partial(FairseqFormSchedule, kind))

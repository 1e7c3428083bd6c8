"""Optimizers and learning rate schedules by name. Add your line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairseq.config.plugins import class_registrar
from fairseq.fairseq_names import lazy
from fairseq.optim import configs as c
from fairseq.registry import Entry

if TYPE_CHECKING:
    from torch.optim import Optimizer

OPTIMIZERS: dict[str, Entry] = {
    "adadelta": Entry(c.AdadeltaConfig, "fairseq.optim.optimizers:make_adadelta"),
    "adafactor": Entry(c.AdafactorConfig, "fairseq.optim.optimizers:make_adafactor"),
    "adagrad": Entry(c.AdagradConfig, "fairseq.optim.optimizers:make_adagrad"),
    "adam": Entry(c.AdamConfig, "fairseq.optim.optimizers:make_adam"),
    "adamax": Entry(c.AdamaxConfig, "fairseq.optim.optimizers:make_adamax"),
    "nag": Entry(c.NagConfig, "fairseq.optim.optimizers:make_nag"),
    "sgd": Entry(c.SgdConfig, "fairseq.optim.optimizers:make_sgd"),
}

LR_SCHEDULERS: dict[str, Entry] = {
    "cosine": Entry(c.CosineConfig, "fairseq.optim.lr_schedulers:CosineSchedule"),
    "fixed": Entry(c.FixedConfig, "fairseq.optim.lr_schedulers:FixedSchedule"),
    "inverse_sqrt": Entry(c.InverseSqrtConfig, "fairseq.optim.lr_schedulers:InverseSqrtSchedule"),
    "manual": Entry(c.ManualConfig, "fairseq.optim.lr_schedulers:ManualSchedule"),
    "polynomial_decay": Entry(c.PolynomialDecayConfig, "fairseq.optim.lr_schedulers:PolynomialDecaySchedule"),
    "reduce_lr_on_plateau": Entry(c.PlateauConfig, "fairseq.optim.lr_schedulers:PlateauSchedule"),
    "tri_stage": Entry(c.TriStageConfig, "fairseq.optim.lr_schedulers:TriStageSchedule"),
    "triangular": Entry(c.TriangularConfig, "fairseq.optim.lr_schedulers:TriangularSchedule"),
}

register_optimizer = class_registrar(OPTIMIZERS, "optimizer", "fairseq.compat.optim:optimizer_entry")
register_lr_scheduler = class_registrar(LR_SCHEDULERS, "lr scheduler", "fairseq.compat.optim:lr_scheduler_entry")
__getattr__, __dir__ = lazy(__name__)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr

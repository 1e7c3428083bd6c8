"""Options of a training run as a whole: validation and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.config import flag, require_at_least
from fairseq.data.batching_config import BatchingConfig, DatasetConfig
from fairseq.optim.configs import EmaConfig, OptimizationConfig
from fairseq.runtime.config import CommonConfig, DistributedConfig, RuntimeConfig
from fairseq.runtime.manifest import Command
from fairseq.tasks.configs import LanguageModelingConfig


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Options of the splits to train and validate on, and of when to validate."""

    train_subset: str = flag("--train-subset", default="train")
    """Split to train on."""
    valid_subset: str = flag("--valid-subset", default="valid")
    """Splits to validate on, separated by commas; the first one decides which checkpoint is best."""
    validate_interval: int = flag("--validate-interval", default=1)
    """Validate every so many epochs."""
    validate_interval_updates: int = flag("--validate-interval-updates", default=0)
    """Validate every so many updates as well; 0 for never."""
    disable_validation: bool = flag("--disable-validation", default=False)
    """Never validate."""
    max_tokens_valid: int | None = flag("--max-tokens-valid", default=None)
    """--max-tokens of validation, when it differs."""
    max_sentences_valid: int | None = flag("--max-sentences-valid", "--batch-size-valid", default=None)
    """--max-sentences of validation, when it differs."""
    max_valid_steps: int | None = flag("--max-valid-steps", "--nval", default=None)
    """Validate on the first so many batches of each split only."""
    combine_valid_subsets: bool = flag("--combine-valid-subsets", "--combine-val", default=False)
    """Validate on each split together with those numbered after it (valid, valid1, ...) as one text."""
    ignore_unused_valid_subsets: bool = flag("--ignore-unused-valid-subsets", default=False)
    """Do not warn of splits numbered after one of --valid-subset that are not validated on."""
    curriculum: int = flag("--curriculum", default=0)
    """Keep the batches of the first so many epochs in order."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            validate_interval=self.validate_interval,
            max_tokens_valid=self.max_tokens_valid,
            max_sentences_valid=self.max_sentences_valid,
            max_valid_steps=self.max_valid_steps,
        )
        require_at_least(0, validate_interval_updates=self.validate_interval_updates, curriculum=self.curriculum)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of the checkpoints that are written, kept and resumed from."""

    save_dir: str = flag("--save-dir", default="checkpoints")
    """Folder of the checkpoints."""
    restore_file: str = flag("--restore-file", default="checkpoint_last.pt")
    """Checkpoint to resume from: a name in --save-dir, or a path."""
    finetune_from_model: str | None = flag("--finetune-from-model", default=None)
    """Checkpoint whose weights alone start a new run."""
    reset_dataloader: bool = flag("--reset-dataloader", default=False)
    """Start at the first epoch's first batch."""
    reset_lr_scheduler: bool = flag("--reset-lr-scheduler", default=False)
    """Start the learning rate schedule afresh."""
    reset_meters: bool = flag("--reset-meters", default=False)
    """Forget the running figures and the best metric."""
    reset_optimizer: bool = flag("--reset-optimizer", default=False)
    """Start the optimizer's state afresh."""
    save_interval: int = flag("--save-interval", default=1)
    """Save every so many epochs."""
    save_interval_updates: int = flag("--save-interval-updates", default=0)
    """Validate and save every so many updates as well; 0 for never."""
    keep_interval_updates: int = flag("--keep-interval-updates", default=-1)
    """Keep only this many of the checkpoints made at intervals of updates; -1 for all."""
    keep_last_epochs: int = flag("--keep-last-epochs", default=-1)
    """Keep only this many of the checkpoints made at ends of epochs; -1 for all."""
    keep_best_checkpoints: int = flag("--keep-best-checkpoints", default=-1)
    """Keep this many best checkpoints beside checkpoint_best.pt; -1 for none."""
    no_save: bool = flag("--no-save", default=False)
    """Write no checkpoint."""
    no_epoch_checkpoints: bool = flag("--no-epoch-checkpoints", default=False)
    """Write only the best and the last checkpoint."""
    no_last_checkpoints: bool = flag("--no-last-checkpoints", default=False)
    """Do not write checkpoint_last.pt."""
    no_save_optimizer_state: bool = flag("--no-save-optimizer-state", default=False)
    """Leave the optimizer's state out; such a checkpoint cannot be continued exactly."""
    best_checkpoint_metric: str = flag("--best-checkpoint-metric", default="loss")
    """Validation figure that decides which checkpoint is best."""
    maximize_best_checkpoint_metric: bool = flag("--maximize-best-checkpoint-metric", default=False)
    """The larger the better."""
    patience: int = flag("--patience", default=-1)
    """Stop after so many validations without a better figure; -1 for never."""

    def __post_init__(self) -> None:
        require_at_least(1, save_interval=self.save_interval)
        require_at_least(0, save_interval_updates=self.save_interval_updates)

    def saves_after(self, update: int) -> bool:
        """True if --save-interval-updates falls on this update."""
        return self.save_interval_updates > 0 and update % self.save_interval_updates == 0


def require_same_parts(
    path: str, saved: Mapping[str, str | None], asked: Mapping[str, str], config: CheckpointConfig
) -> None:
    """Raise ValueError when a run would resume with another loss, optimizer or schedule than it was started with.

    Args:
        saved: what the checkpoint at ``path`` was trained with; None is not known.
    """
    for name, flag_name, reset in (
        ("criterion", "--reset-optimizer", config.reset_optimizer),
        ("optimizer", "--reset-optimizer", config.reset_optimizer),
        ("lr_scheduler", "--reset-lr-scheduler", config.reset_lr_scheduler),
    ):
        before, now = saved.get(name), asked[name]
        if before not in (None, now) and not reset:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{path} was trained with {option} {before}, now it says {now}: give {before}, or {flag_name} to start "
                "that afresh, or another --save-dir"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfigs:
    """Every config of one training command, each validated before anything is loaded."""

    command: Command
    chosen: Mapping[str, str]
    """Names of the task, architecture, criterion, optimizer and schedule."""
    options: Mapping[str, Any]
    """Values the user gave, from which the parts chosen by name build their own configs."""
    task: LanguageModelingConfig
    runtime: RuntimeConfig
    common: CommonConfig
    data: DatasetConfig
    batching: BatchingConfig
    validation: ValidationConfig
    distributed: DistributedConfig
    optimization: OptimizationConfig
    checkpoints: CheckpointConfig
    ema: EmaConfig = EmaConfig()


def require_strategy_fits(configs: TrainingConfigs, model: Any) -> None:
    """Raise ValueError for settings that a way to spread a model over processes cannot compute.

    Args:
        model: its config.
    """
    strategy, stage = configs.distributed.effective_strategy, configs.distributed.zero_stage
    if strategy in ("auto", "ddp"):
        return
    asked = f"--strategy {strategy}"
    if configs.chosen["optimizer"] == "adafactor":
        raise ValueError(
            f"--optimizer adafactor with {asked}: its row and column averages need whole weights; give --optimizer "
            "adam, or --strategy ddp"
        )
    if strategy == "fsdp" and configs.runtime.any_fp16:
        raise ValueError(f"--fp16 with {asked}: the loss scale needs whole gradients; give --bf16")
    dropped = [name for name in ("encoder_layerdrop", "decoder_layerdrop") if getattr(model, name, 0) > 0]
    if dropped and (strategy == "fsdp" or stage == 3):
        raise ValueError(
            f"--{dropped[0].replace('_', '-')} with {asked}: processes that drop different layers would wait for each "
            "other for ever; leave it out, or give --strategy ddp"
        )
    if getattr(model, "graph_probability", 1.0) < 1 and (strategy == "fsdp" or stage == 3):
        raise ValueError(
            f"--graph-probability {model.graph_probability} with {asked}: processes whose coins differ would wait for "
            "each other for ever; give --strategy ddp"
        )
    if configs.ema.store_ema and stage == 3:
        raise ValueError(f"--store-ema with {asked}: no process holds the weights to average; give --strategy fsdp")

"""What can be set about a run as a whole: precision, data loading, devices, optimisation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fairseq.config import flag, float_list, int_list, require_at_least


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Seed, precision, device and plug-ins of any command that runs a model."""

    seed: int = flag("--seed", default=1)
    """Seed of initial weights, dropout and data order."""
    cpu: bool = flag("--cpu", default=False)
    """Use the processor even when a GPU is there."""
    fp16: bool = flag("--fp16", default=False)
    """Half precision (on a GPU: mixed for training, float16 weights for evaluation)."""
    memory_efficient_fp16: bool = flag("--memory-efficient-fp16", default=False)
    """Train with float16 weights as well."""
    bf16: bool = flag("--bf16", default=False)
    """bfloat16 instead of float16; needs no loss scale."""
    memory_efficient_bf16: bool = flag("--memory-efficient-bf16", default=False)
    """Train with bfloat16 weights as well."""
    fp16_init_scale: int = flag("--fp16-init-scale", default=128)
    """First loss scale of float16 training."""
    user_dir: str | None = flag("--user-dir", default=None)
    """Folder or file of a plug-in to import before the flags are read."""
    deterministic: bool = flag("--deterministic", default=False)
    """Let PyTorch use deterministic algorithms only, and say so where there is none."""

    def __post_init__(self) -> None:
        if self.any_fp16 and self.any_bf16:
            raise ValueError("--fp16 and --bf16 exclude each other; give one of them")
        require_at_least(0, seed=self.seed)

    @property
    def any_fp16(self) -> bool:
        """Whether some form of float16 was asked for."""
        return self.fp16 or self.memory_efficient_fp16

    @property
    def any_bf16(self) -> bool:
        """Whether some form of bfloat16 was asked for."""
        return self.bf16 or self.memory_efficient_bf16


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """How blocks of text become batches."""

    num_workers: int = flag("--num-workers", default=1)
    """Threads that prepare batches ahead; 0 prepares them in the main thread."""
    max_tokens: int | None = flag("--max-tokens", default=None)
    """Largest number of tokens in a batch, pads included; a context window comes on top."""
    max_sentences: int | None = flag("--max-sentences", "--batch-size", default=None)
    """Largest number of blocks in a batch."""
    required_batch_size_multiple: int = flag("--required-batch-size-multiple", default=8)
    """Batches of at least this many blocks hold a multiple of it."""
    skip_invalid_size_inputs_valid_test: bool = flag("--skip-invalid-size-inputs-valid-test", default=False)
    """Leave blocks longer than the model's positions out of validation instead of stopping."""

    def __post_init__(self) -> None:
        if self.max_tokens is None and self.max_sentences is None:
            raise ValueError("give --max-tokens or --max-sentences: the size of a batch is not known otherwise")
        require_at_least(0, num_workers=self.num_workers)
        require_at_least(
            1,
            max_tokens=self.max_tokens,
            max_sentences=self.max_sentences,
            required_batch_size_multiple=self.required_batch_size_multiple,
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is trained on, what is validated on, and when."""

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
    curriculum: int = flag("--curriculum", default=0)
    """Keep the batches of the first so many epochs in order."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            validate_interval=self.validate_interval,
            max_tokens_valid=self.max_tokens_valid,
            max_sentences_valid=self.max_sentences_valid,
        )
        require_at_least(0, validate_interval_updates=self.validate_interval_updates, curriculum=self.curriculum)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How many processes train one model. Under torchrun its own settings count."""

    distributed_world_size: int | None = flag("--distributed-world-size", "--nprocs-per-node", default=None)
    """Processes on this machine; by default one per GPU, or one on a processor."""
    find_unused_parameters: bool = flag("--find-unused-parameters", default=False)
    """Let every rank look for parameters that had no gradient (always on with an adaptive softmax)."""

    def __post_init__(self) -> None:
        require_at_least(1, distributed_world_size=self.distributed_world_size)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How long and how far each update goes."""

    max_epoch: int = flag("--max-epoch", "--me", default=0)
    """Stop after this epoch; 0 for no limit."""
    max_update: int = flag("--max-update", "--mu", default=0)
    """Stop after this update; 0 for no limit."""
    stop_time_hours: float = flag("--stop-time-hours", default=0.0)
    """Stop (with a checkpoint) after this many hours; 0 for no limit."""
    clip_norm: float = flag("--clip-norm", default=25.0)
    """Scale gradients down to this norm; 0 leaves them alone."""
    update_freq: tuple[int, ...] = flag("--update-freq", default=(1,), parse=int_list)
    """Batches per update and process; a list gives one number per epoch, the last one going on."""
    lr: tuple[float, ...] = flag("--lr", "--learning-rate", default=(0.25,), parse=float_list)
    """Learning rate; a list gives one per epoch, see the schedule."""
    min_lr: float = flag("--min-lr", "--stop-min-lr", default=-1.0)
    """Stop training once the learning rate is this small."""

    def __post_init__(self) -> None:
        if min(self.update_freq) < 1:
            raise ValueError(f"--update-freq must be at least 1, got {','.join(map(str, self.update_freq))}")
        if self.max_epoch <= 0 and self.max_update <= 0 and self.stop_time_hours <= 0 and self.min_lr < 0:
            raise ValueError("training would never stop; give --max-update, --max-epoch or --stop-time-hours")
        if not all(0 <= rate < math.inf for rate in self.lr):
            raise ValueError(f"--lr must be finite and at least 0, got {','.join(map(str, self.lr))}")

    def update_freq_in(self, epoch: int) -> int:
        """Batches per update in an epoch (counted from 1)."""
        return self.update_freq[min(epoch, len(self.update_freq)) - 1]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are written, kept, and continued from."""

    save_dir: str = flag("--save-dir", default="checkpoints")
    """Folder of the checkpoints."""
    restore_file: str = flag("--restore-file", default="checkpoint_last.pt")
    """Checkpoint to go on from: a name in --save-dir, or a path."""
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


def require_same_parts(
    path: str, saved: Mapping[str, str | None], asked: Mapping[str, str], config: CheckpointConfig
) -> None:
    """Raise ValueError when a run would go on with another loss, optimizer or schedule than it was begun with.

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

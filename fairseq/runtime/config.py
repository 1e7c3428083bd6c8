"""Options shared by every command with a model: seed, precision, devices, processes, logging."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from fairseq.config import flag, require_at_least
from fairseq.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Seed, precision, device and plug-ins of any command that runs a model."""

    seed: int = flag("--seed", default=1)
    """Seed of initial weights, dropout and data order."""
    cpu: bool = flag("--cpu", default=False)
    """Use the CPU even when there is a GPU."""
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
    """Restrict PyTorch to deterministic algorithms, with a warning for operations that have none."""

    def __post_init__(self) -> None:
        if self.any_fp16 and self.any_bf16:
            raise ValueError("--fp16 and --bf16 exclude each other; give one of them")
        require_at_least(0, seed=self.seed)

    @property
    def any_fp16(self) -> bool:
        """True if some form of float16 is requested."""
        return self.fp16 or self.memory_efficient_fp16

    @property
    def any_bf16(self) -> bool:
        """True if some form of bfloat16 is requested."""
        return self.bf16 or self.memory_efficient_bf16


STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
_BACKENDS = {"fully_sharded": "fsdp"} | dict.fromkeys(("c10d", "legacy_ddp", "no_c10d", "pytorch_ddp"), "ddp")


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Options of data-parallel training; under torchrun its own settings apply."""

    distributed_world_size: int | None = flag("--distributed-world-size", "--nprocs-per-node", default=None)
    """Processes on this machine; by default one per GPU, or one on a CPU."""
    find_unused_parameters: bool = flag("--find-unused-parameters", default=False)
    """Make every rank search for parameters without gradients (always on with an adaptive softmax)."""
    strategy: str = flag("--strategy", default="auto", choices=STRATEGIES)
    """Where weights, gradients and optimizer states lie: whole on every process (ddp; auto with several processes), in
    parts (fsdp), or as DeepSpeed's stages of ZeRO have it."""
    ddp_backend: str | None = flag("--ddp-backend", default=None, choices=tuple(_BACKENDS))
    """fairseq's spelling of --strategy: fully_sharded is fsdp, any other ddp."""
    cpu_offload: bool = flag("--cpu-offload", default=False)
    """Keep the parts of fsdp, or the optimizer states of ZeRO, in the memory of the CPU."""
    no_reshard_after_forward: bool = flag("--no-reshard-after-forward", default=False)
    """Keep fsdp's weights whole from the forward to the backward pass: faster, and more memory."""
    use_sharded_state: bool = flag("--use-sharded-state", default=False)
    """Let every process write its own part of a checkpoint (fsdp). Any command and any number of processes reads it."""

    def __post_init__(self) -> None:
        require_at_least(1, distributed_world_size=self.distributed_world_size)
        asked = _BACKENDS.get(self.ddp_backend or "")
        if asked and self.strategy not in ("auto", asked):
            raise ValueError(
                f"--ddp-backend {self.ddp_backend} means --strategy {asked}, but --strategy {self.strategy} was given; "
                "leave one of them out"
            )
        chosen = self.effective_strategy
        if self.use_sharded_state and chosen != "fsdp":
            raise ValueError(f"--use-sharded-state belongs to --strategy fsdp, not {chosen}; leave it out")
        if self.no_reshard_after_forward and chosen != "fsdp":
            raise ValueError(f"--no-reshard-after-forward belongs to --strategy fsdp, not {chosen}; leave it out")
        if self.cpu_offload and chosen in ("auto", "ddp"):
            raise ValueError(f"--cpu-offload belongs to --strategy fsdp or deepspeed_..., not {chosen}; leave it out")

    @property
    def effective_strategy(self) -> str:
        """The strategy that --strategy or --ddp-backend asks for."""
        asked = _BACKENDS.get(self.ddp_backend or "") if self.strategy == "auto" else None
        return self.strategy if asked in (None, "ddp") else asked

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage of ZeRO; 0 for another strategy."""
        chosen = self.effective_strategy
        return int(chosen[-1]) if chosen.startswith("deepspeed") else 0


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Options of logging and progress."""

    no_progress_bar: bool = flag("--no-progress-bar", default=False)
    """Log lines instead of a progress bar."""
    log_interval: int = flag("--log-interval", default=1000)
    """Updates between two lines (or refreshed figures of the bar)."""
    log_format: str | None = flag("--log-format", default=None, choices=("json", "none", "simple", "tqdm"))
    """Format of the progress; by default a bar on a terminal and simple lines elsewhere."""
    log_file: str | None = flag("--log-file", default=None)
    """File for a copy of all log lines."""
    tensorboard_logdir: str = flag("--tensorboard-logdir", default="")
    """Folder for TensorBoard's event files."""
    wandb_project: str | None = flag("--wandb-project", default=None)
    """Project on Weights & Biases."""

    def __post_init__(self) -> None:
        require_at_least(1, log_interval=self.log_interval)

    @property
    def form(self) -> str:
        """The progress format in effect; a bar is shown on terminals only."""
        requested = self.log_format or ("simple" if self.no_progress_bar else "tqdm")
        return "simple" if requested == "tqdm" and not sys.stderr.isatty() else requested


def check_target(flag: str, target: str) -> None:
    """Raise ValueError unless a flag's value is ``ray`` or ``ray://ADDRESS``."""
    if target == "ray" or re.fullmatch(r"ray://(auto|.+:\d+)", target):
        return
    hint = did_you_mean(target, ["ray"])
    raise ValueError(f"{flag} {target} is not ray or ray://HOST:PORT (the address that ray start prints){hint}")

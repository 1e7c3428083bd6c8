"""Processes, devices and precision of a pipeline, through Lightning Fabric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.runtime.config import DistributedConfig
from fairseq.runtime.distributed import launch_fabric, where_tensors_lie
from fairseq.runtime.strategies.whole import WholeOnEveryProcess

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def check_devices(config: PipelineConfig, *, trains: bool = False) -> None:
    """Raise ValueError when the precision or the index, or the strategy of training, needs what is not here."""
    fabric = config.fabric
    wants = {"fabric.accelerator cuda": fabric.accelerator == "cuda", "knn.use_gpu": config.knn.use_gpu}
    for what, is_wanted in wants.items():
        if is_wanted and not torch.cuda.is_available():
            raise ValueError(f"{what}: there is no GPU here")
    if on_gpu(config) and fabric.devices > torch.cuda.device_count():
        raise ValueError(
            f"fabric.devices is {fabric.devices} and this machine has {torch.cuda.device_count()} GPUs; give fewer, or "
            "fabric.accelerator=cpu"
        )
    if trains and is_deepspeed(config):
        from fairseq.runtime.strategies.zero import require_deepspeed

        require_deepspeed(f"fabric.strategy {fabric.strategy}", "fabric.strategy=fsdp", on_gpu=on_gpu(config))


def on_gpu(config: PipelineConfig) -> bool:
    """True if the model runs on GPUs."""
    return torch.cuda.is_available() and config.fabric.accelerator != "cpu"


def is_deepspeed(config: PipelineConfig) -> bool:
    """True if DeepSpeed trains."""
    return config.fabric.strategy.startswith("deepspeed")


def _distributed(config: PipelineConfig, *, trains: bool) -> DistributedConfig:
    strategy = config.fabric.strategy
    if is_deepspeed(config):
        strategy = f"deepspeed_stage_{config.deepspeed.zero_optimization.stage}"
    return DistributedConfig(distributed_world_size=config.fabric.devices, strategy=strategy if trains else "ddp")


def launch(config: PipelineConfig, *, trains: bool = False) -> Fabric:
    """Start the processes.

    Args:
        trains: True for the strategy of the config; otherwise each process reads with a whole copy of the model.
    """
    return launch_fabric(
        _distributed(config, trains=trains),
        on_gpu=on_gpu(config),
        precision=config.fabric.precision,
        num_nodes=config.fabric.num_nodes,
        clip_norm=config.training.max_grad_norm,
    )


def training_layout(config: PipelineConfig, fabric: Fabric) -> WholeOnEveryProcess:
    """Where weights, gradients and the optimizer's state lie in training."""
    return where_tensors_lie(fabric, _distributed(config, trains=True))


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a transformers model that may be spread one by one.

    They are those that the model itself names as indivisible, outermost ones only, and without any that shares a weight
    with a part outside of it, such as an embedding that is the output layer too.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    uses = _uses(model)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in names and module not in inside:
            inside.update(module.modules())
            own = _uses(module)
            if own and all(uses[number] == count for number, count in own.items()):
                found.append(module)
    return found


def _uses(module: nn.Module) -> Counter[int]:
    """How often each weight occurs in a module, by its identity."""
    weights: Iterable[tuple[str, nn.Parameter]] = module.named_parameters(remove_duplicate=False)
    return Counter(id(weight) for _, weight in weights)

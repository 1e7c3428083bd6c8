"""Processes, devices and precision of a pipeline, through Lightning Fabric."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from fairseq.hf.pipeline.config import PipelineConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def check_devices(config: PipelineConfig) -> None:
    """Raise ValueError when the strategy, the precision or the index needs what is not here."""
    fabric = config.fabric
    has_gpu = torch.cuda.is_available()
    if is_deepspeed(config) and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"fabric.strategy {fabric.strategy} needs the package deepspeed: pip install deepspeed")
    if is_sharded(config) and not on_gpu(config):
        raise ValueError(f"fabric.strategy {fabric.strategy} needs a GPU; on CPUs use ddp")
    wants = {"fabric.accelerator cuda": fabric.accelerator == "cuda", "knn.use_gpu": config.knn.use_gpu}
    for what, is_wanted in wants.items():
        if is_wanted and not has_gpu:
            raise ValueError(f"{what}: there is no GPU here")


def on_gpu(config: PipelineConfig) -> bool:
    """True if the model runs on GPUs."""
    return torch.cuda.is_available() and config.fabric.accelerator != "cpu"


def is_deepspeed(config: PipelineConfig) -> bool:
    """True if DeepSpeed trains."""
    return config.fabric.strategy.startswith("deepspeed")


def is_sharded(config: PipelineConfig) -> bool:
    """True if no process has the whole state of training."""
    return is_deepspeed(config) or config.fabric.strategy == "fsdp"


def launch(config: PipelineConfig, model: Any = None) -> Fabric:
    """Start the processes.

    Args:
        model: the model that is trained; without one, each process reads with a whole copy of it.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    devices, nodes = config.fabric.devices, config.fabric.num_nodes
    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = max(1, elastic.world_size() // devices)
    fabric = Fabric(
        accelerator="cuda" if on_gpu(config) else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(config, model, devices * nodes),
        precision=config.fabric.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def _strategy(config: PipelineConfig, model: Any, world: int) -> Any:
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
    from lightning.fabric.strategies.fsdp import FSDPStrategy

    if model is None or not is_sharded(config):
        return DDPStrategy() if world > 1 else "auto"
    if is_deepspeed(config):
        stage, longest = config.deepspeed.zero_optimization.stage, config.training.max_grad_norm
        settings: dict[str, Any] = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        return DeepSpeedStrategy(config=settings | {"gradient_clipping": longest})
    # Whole layers are units, so that weights that input and output share stay in one.
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = {type(module) for module in model.modules() if type(module).__name__ in names}
    return FSDPStrategy(auto_wrap_policy=layers or None, state_dict_type="full")

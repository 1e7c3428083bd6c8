"""Processes, devices and precision through Lightning Fabric, and the few sums that ranks exchange."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from fairseq.training_config import DistributedConfig, RuntimeConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger(__name__)


def runs_on_gpu(runtime: RuntimeConfig) -> bool:
    """Whether a model is to run on a CUDA device."""
    return torch.cuda.is_available() and not runtime.cpu


def _precision(runtime: RuntimeConfig, on_gpu: bool) -> str:
    """Fabric's name for the training precision."""
    if runtime.any_fp16 and not on_gpu:
        logger.warning("--fp16 needs a GPU; training goes on in float32 (--bf16 runs on processors)")
        return "32-true"
    if runtime.memory_efficient_fp16:
        return "16-true"
    if runtime.memory_efficient_bf16:
        return "bf16-true"
    if runtime.fp16:
        return "16-mixed"
    return "bf16-mixed" if runtime.bf16 else "32-true"


def make_fabric(runtime: RuntimeConfig, distributed: DistributedConfig, find_unused_parameters: bool) -> Fabric:
    """Launch Fabric with as many processes as asked for; under torchrun its environment counts.

    Args:
        find_unused_parameters: some parameters may have no gradient in some batches.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.plugins.precision import MixedPrecision
    from lightning.fabric.strategies import DDPStrategy

    on_gpu = runs_on_gpu(runtime)
    world = distributed.distributed_world_size or (torch.cuda.device_count() if on_gpu else 1)
    nodes = 1
    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        nodes = max(1, elastic.world_size() // _local_world_size())
        world = _local_world_size()
    precision = _precision(runtime, on_gpu)
    plugins = []
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=runtime.fp16_init_scale)
        plugins.append(MixedPrecision("16-mixed", "cuda", scaler=scaler))
    strategy = DDPStrategy(find_unused_parameters=find_unused_parameters) if world * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=world,
        num_nodes=nodes,
        strategy=strategy,
        precision=None if plugins else precision,  # type: ignore[arg-type]
        plugins=plugins or None,
    )
    fabric.launch()
    return fabric


def _local_world_size() -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sum_over_ranks(fabric: Fabric, values: list[float]) -> list[float]:
    """Add up each figure over all ranks, in float64."""
    if fabric.world_size == 1:
        return values
    summed = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="sum")
    return summed.tolist()  # type: ignore[union-attr]

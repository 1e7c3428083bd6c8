"""Processes, devices and precision through Lightning Fabric, and collective operations between ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq.runtime.config import DistributedConfig, RuntimeConfig
from fairseq.runtime.strategies.whole import WholeOnEveryProcess

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger(__name__)


def runs_on_gpu(runtime: RuntimeConfig) -> bool:
    """True if a model is to run on a CUDA device."""
    return torch.cuda.is_available() and not runtime.cpu


def _precision(runtime: RuntimeConfig, on_gpu: bool) -> str:
    """Fabric's name of the training precision."""
    if runtime.any_fp16 and not on_gpu:
        logger.warning("--fp16 needs a GPU; training runs in float32 (--bf16 runs on CPUs)")
        return "32-true"
    if runtime.memory_efficient_fp16:
        return "16-true"
    if runtime.memory_efficient_bf16:
        return "bf16-true"
    if runtime.fp16:
        return "16-mixed"
    return "bf16-mixed" if runtime.bf16 else "32-true"


def make_fabric(
    runtime: RuntimeConfig, distributed: DistributedConfig, find_unused_parameters: bool, clip_norm: float = 0.0
) -> Fabric:
    """Launch Fabric as the flags of ``train.py`` ask for; see :func:`launch_fabric`."""
    from lightning.fabric.plugins.precision import MixedPrecision

    on_gpu = runs_on_gpu(runtime)
    precision = _precision(runtime, on_gpu)
    plugins: list[Any] = []
    if precision == "16-mixed" and not distributed.zero_stage:  # DeepSpeed scales losses itself
        scaler = torch.amp.GradScaler("cuda", init_scale=runtime.fp16_init_scale)
        plugins.append(MixedPrecision("16-mixed", "cuda", scaler=scaler))
    return launch_fabric(
        distributed,
        on_gpu=on_gpu,
        precision=None if plugins else precision,
        plugins=plugins or None,
        find_unused_parameters=find_unused_parameters,
        clip_norm=clip_norm,
    )


def launch_fabric(
    distributed: DistributedConfig,
    *,
    on_gpu: bool,
    precision: str | None,
    num_nodes: int = 1,
    plugins: list[Any] | None = None,
    find_unused_parameters: bool = False,
    clip_norm: float = 0.0,
) -> Fabric:
    """Launch Fabric with the requested number of processes; under torchrun its environment takes precedence.

    Args:
        precision: Fabric's name of it; None where a plugin says it.
        find_unused_parameters: some parameters may have no gradient in some batches.
        clip_norm: largest norm of gradients, for strategies that clip by themselves; 0 for none.
    Raises: ValueError when the strategy cannot be had here.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    world = distributed.distributed_world_size or (torch.cuda.device_count() if on_gpu else 1)
    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        num_nodes = max(1, elastic.world_size() // _local_world_size())
        world = _local_world_size()
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=world,
        num_nodes=num_nodes,
        strategy=_layout(distributed).fabric_strategy(
            distributed,
            world * num_nodes,
            find_unused_parameters=find_unused_parameters,
            clip_norm=clip_norm,
            on_gpu=on_gpu,
        ),
        precision=precision,  # type: ignore[arg-type]
        plugins=plugins,
    )
    fabric.launch()
    return fabric


def where_tensors_lie(fabric: Fabric, distributed: DistributedConfig) -> WholeOnEveryProcess:
    """What a training run needs to know of its strategy."""
    return _layout(distributed)(fabric)


def _layout(distributed: DistributedConfig) -> type[WholeOnEveryProcess]:
    if distributed.zero_stage:
        from fairseq.runtime.strategies.zero import ZeroSharded

        return ZeroSharded
    if distributed.effective_strategy == "fsdp":
        from fairseq.runtime.strategies.fully_sharded import FullySharded

        return FullySharded
    return WholeOnEveryProcess


def _local_world_size() -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sum_over_ranks(fabric: Fabric, values: list[float]) -> list[float]:
    """Sum each figure over all ranks, in float64."""
    if fabric.world_size == 1:
        return values
    summed = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="sum")
    return summed.tolist()  # type: ignore[union-attr]


@dataclass(frozen=True)
class Gathered:
    """Tensors of all ranks in the order of ranks, joined along their first dimension."""

    tensors: tuple[Tensor, ...]
    counts: tuple[int, ...]
    """Number of rows of each rank."""

    def rows_of(self, first_rank: int, last_rank: int) -> slice:
        """Range of the rows from one rank up to another (not included)."""
        return slice(sum(self.counts[:first_rank]), sum(self.counts[:last_rank]))


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather_ragged(*tensors: Tensor, with_gradient: bool = False) -> Gathered:
    """Gather tensors of all ranks, whose numbers of rows may differ between ranks (but not between tensors).

    Every rank must call this, with the same number of tensors, even without rows.

    Args:
        with_gradient: True to send gradients back to the ranks of the rows. Then every rank must also run backward,
            through a loss that depends on the result.
    """
    _, world = rank_and_world()
    if world == 1:
        return Gathered(tensors, (len(tensors[0]),))
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    gathered = [torch.empty_like(own) for _ in range(world)]
    torch.distributed.all_gather(gathered, own)
    counts = tuple(torch.cat(gathered).tolist())

    def gather(x: Tensor) -> Tensor:
        joined: Tensor = _Gather.apply(x, counts) if with_gradient else _join(x.detach(), counts)  # type: ignore[no-untyped-call]
        return joined

    return Gathered(tuple(gather(x) if x.is_floating_point() else _join(x, counts) for x in tensors), counts)


def _join(tensor: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Rows of all ranks. Collective operations require equal sizes, so each rank pads to the largest count."""
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])


class _Gather(torch.autograd.Function):
    """:func:`_join` whose gradient is the sum of all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return _join(tensor, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad)
        rank, _ = rank_and_world()
        start = sum(ctx.counts[:rank])
        return grad[start : start + ctx.counts[rank]], None

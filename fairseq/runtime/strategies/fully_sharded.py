"""Fully sharded data parallelism (FSDP2): every process holds a part of each weight, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from fairseq.runtime.strategies.whole import MakeOptimizer, WholeOnEveryProcess

if TYPE_CHECKING:
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    from fairseq.runtime.config import DistributedConfig


class _Units:
    """The parts of the module to spread one by one; known only after Fabric asks for a function that spreads them."""

    def __init__(self, config: DistributedConfig) -> None:
        self.config = config
        self.found: Sequence[nn.Module] = ()

    def spread(self, module: nn.Module, mesh: Any) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        settings = {
            "mesh": mesh["data_parallel"],
            "reshard_after_forward": not self.config.no_reshard_after_forward,
            "offload_policy": CPUOffloadPolicy() if self.config.cpu_offload else OffloadPolicy(),
        }
        for unit in self.found:
            fully_shard(unit, **settings)
        # What is left, such as embeddings that the loss reads too, stays whole from the forward to the backward pass.
        fully_shard(module, **(settings | {"reshard_after_forward": False}))
        return module


class FullySharded(WholeOnEveryProcess):
    """See the module; ZeRO's stage 3, or 2 with ``--no-reshard-after-forward`` (arXiv 1910.02054)."""

    @classmethod
    def fabric_strategy(
        cls,
        config: DistributedConfig,
        world_size: int,
        *,
        find_unused_parameters: bool,
        clip_norm: float,
        on_gpu: bool,
    ) -> ModelParallelStrategy:
        """See the base class."""
        from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

        return ModelParallelStrategy(_Units(config).spread, data_parallel_size=world_size, tensor_parallel_size=1)

    def set_up(self, module: nn.Module, units: Sequence[nn.Module], make_optimizer: MakeOptimizer) -> None:
        """See the base class."""
        self.module = module
        plan = self.fabric.strategy._parallelize_fn.__self__  # type: ignore[attr-defined]
        plan.found, self._reshards = units, not plan.config.no_reshard_after_forward
        self.wrapped = self.fabric.setup_module(module)
        self.optimizer = self.fabric.setup_optimizers(make_optimizer())

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        spread = [part for part in self.module.modules() if isinstance(part, FSDPModule)]
        for part in spread:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)  # what is called next may be no forward pass
        try:
            yield
        finally:
            for part in spread:
                part.reshard()
                part.set_reshard_after_forward(part is not self.module and self._reshards, recurse=False)

    def evaluating(self) -> AbstractContextManager[Any]:
        """See the base class. What is collected in inference mode could not be trained with afterwards."""
        return torch.no_grad()

    def direct_use(self) -> AbstractContextManager[Any]:
        """See the base class."""
        return self._unsharded()

    def whole_figure(self, value: Tensor) -> Tensor:
        """See the base class."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def collected(self, value: Any) -> Any:
        """See the base class."""
        keeps = self.fabric.is_global_zero

        def collect(entry: Any) -> Any:
            if not isinstance(entry, DTensor):
                return entry
            whole = entry.full_tensor().detach()
            return whole.cpu() if keeps else whole.new_empty(0)

        return tree_map(collect, value)

    def held(self, tensor: Tensor) -> Tensor | None:
        """See the base class."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else None

    def spread(self, value: Any, template: Any) -> Any:
        """See the base class."""
        fits = isinstance(value, Tensor) and not isinstance(value, DTensor) and isinstance(template, DTensor)
        if not fits or value.shape != template.shape:
            return value
        with torch.no_grad():
            return distribute_tensor(value.to(template.device), template.device_mesh, template.placements)

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """See the base class."""
        own = model.state_dict()
        model.load_state_dict({name: self.spread(value, own.get(name)) for name, value in weights.items()})

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """See the base class."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        spread = {
            number: {name: self.spread(value, params[number]) for name, value in entries.items()}
            for number, entries in state["state"].items()
            if number < len(params)
        }
        self.optimizer.load_state_dict(state | {"state": spread})

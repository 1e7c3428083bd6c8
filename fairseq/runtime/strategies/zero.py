"""DeepSpeed's ZeRO (arXiv 1910.02054): spread optimizer states (stage 1), gradients too (2), weights too (3)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.runtime.strategies.whole import MakeOptimizer, WholeOnEveryProcess

if TYPE_CHECKING:
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy

    from fairseq.runtime.config import DistributedConfig


def require_deepspeed(asked: str, other: str, *, on_gpu: bool) -> None:
    """Import DeepSpeed.

    Args:
        asked: the setting that needs it.
        other: a setting to give instead.
    Raises: ValueError when it cannot be imported.
    """
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed takes a GPU that it sees
    try:
        import deepspeed  # noqa: F401
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{asked}: DeepSpeed cannot be imported ({reason[0]}); install it beside PyTorch (pip install deepspeed), "
            f"or give {other}"
        ) from error


def _on_cpu(base: type[DeepSpeedStrategy]) -> type[DeepSpeedStrategy]:
    """Fabric rejects DeepSpeed without a GPU; DeepSpeed itself runs on CPUs, over Gloo."""

    class DeepSpeedOnCpu(base):  # type: ignore[valid-type, misc]
        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            if not getattr(self, "_config_initialized", False):
                self._format_config()
                self._config_initialized = True

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)  # DeepSpeed wants a number

    return DeepSpeedOnCpu


class ZeroSharded(WholeOnEveryProcess):
    """See the module. Reading and writing of states goes through DeepSpeed's own functions for single parameters."""

    scales_loss = True

    @classmethod
    def fabric_strategy(
        cls,
        config: DistributedConfig,
        world_size: int,
        *,
        find_unused_parameters: bool,
        clip_norm: float,
        on_gpu: bool,
    ) -> DeepSpeedStrategy:
        """See the base class."""
        require_deepspeed(f"--strategy {config.effective_strategy}", "--strategy fsdp", on_gpu=on_gpu)
        from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy

        kind = DeepSpeedStrategy if on_gpu else _on_cpu(DeepSpeedStrategy)
        strategy = kind(
            stage=config.zero_stage,
            offload_optimizer=config.cpu_offload,
            offload_parameters=config.cpu_offload and config.zero_stage == 3,
            process_group_backend=None if on_gpu else "gloo",
        )
        assert isinstance(strategy.config, dict), "made from the arguments"
        strategy.config["gradient_clipping"] = clip_norm
        strategy.config["train_micro_batch_size_per_gpu"] = 1  # it is only reported
        strategy.config["zero_force_ds_cpu_optimizer"] = False  # offloaded states are stepped by our own optimizers
        return strategy

    def set_up(self, module: nn.Module, units: Sequence[nn.Module], make_optimizer: MakeOptimizer) -> None:
        """See the base class."""
        self.module = module
        self.wrapped, self.optimizer = self.fabric.setup(module, make_optimizer())

    @property
    def _engine(self) -> Any:
        return self.fabric.strategy.model  # type: ignore[attr-defined]

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed steps, over flat parts of the parameters."""
        return self._engine.optimizer.optimizer  # type: ignore[no-any-return]

    @property
    def _flat_parts(self) -> list[Tensor]:
        """This process's parts of the parameters in float32, end to end, one tensor a group."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    @property
    def _stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """See the base class."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, factor: float) -> None:
        """See the base class."""
        self.fabric.backward(loss * factor)

    def step(self, factor: float, limit: float) -> float:
        """See the base class; DeepSpeed clips by itself."""
        self.optimizer.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def direct_use(self, *, keeps_changes: bool = False) -> AbstractContextManager[Any]:
        """See the base class.

        Args:
            keeps_changes: what the first process changes is taken over by all.
        """
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        params = list(self.module.parameters())
        return deepspeed.zero.GatheredParameters(params, modifier_rank=0 if keeps_changes else None)  # type: ignore[no-any-return]

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """See the base class."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {id(p): safe_get_full_fp32_param(p) for p in model.parameters() if p.requires_grad}
        with self.direct_use():
            state = model.state_dict(keep_vars=True)
            return {
                name: value.detach().cpu().clone() if found.get(id(value)) is None else found[id(value)].cpu()
                for name, value in state.items()
            }

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """See the base class."""
        with self.direct_use(keeps_changes=True):
            model.load_state_dict(weights)
            # The float32 values are not the parameters', which have been rounded where these are of another type.
            values = [
                (param, weights.get(name, param).detach().to(param.device, torch.float32, copy=True))
                for name, param in model.named_parameters()
                if param.requires_grad
            ]
        for param, value in values:
            self._set(param, value, None)

    def _set(self, param: nn.Parameter, value: Tensor, name: str | None) -> None:
        """Set the float32 value of a parameter, or its entry of the optimizer's state."""
        from deepspeed import utils

        if self._stage < 3:
            if name is None:
                utils.safe_set_full_fp32_param(param, value)
            else:
                utils.safe_set_full_optimizer_state(param, value, name)
            return
        # Not by the functions for full values: they fail where the size is no multiple of the number of processes.
        size = utils.safe_get_local_fp32_param(param).numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.fabric.world_size - value.numel()))
        own = padded.narrow(0, size * self.fabric.global_rank, size)
        if name is None:
            utils.safe_set_local_fp32_param(param, own)
        else:
            utils.safe_set_local_optimizer_state(param, own, name)

    def optimizer_state(self) -> dict[str, Any]:
        """See the base class."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat: Mapping[str, Any] = next(iter(self._inner.state.values()), {})
        params = [p for p in self.module.parameters() if p.requires_grad]
        state: dict[int, dict[str, Any]] = {}
        for number, param in enumerate(params):
            # Copies of the step: an optimizer that loads one tensor for all would count it up once for each of them.
            state[number] = {
                name: safe_get_full_optimizer_state(param, name).cpu()
                if _has_one_per_weight(value)
                else copy.deepcopy(value)
                for name, value in flat.items()
            }
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._inner.param_groups]
        if len(groups) == 1:
            groups[0]["params"] = list(range(len(params)))
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """See the base class."""
        params = [p for p in self.module.parameters() if p.requires_grad]
        if len(state["state"]) != len(params):
            raise ValueError(f"{len(state['state'])} states for {len(params)} parameters")
        for flat in self._flat_parts:  # DeepSpeed makes them in the first step
            self._inner.state[flat] = {
                name: torch.zeros_like(flat) if _has_one_per_weight(value) else copy.deepcopy(value)
                for name, value in state["state"][0].items()
            }
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for number, param in enumerate(params):
            for name, value in state["state"][number].items():
                if _has_one_per_weight(value):
                    self._set(param, value.float(), name)


def _has_one_per_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0

"""Training with everything whole on every process: one process, or DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fairseq.runtime.config import DistributedConfig

MakeOptimizer = Callable[[], torch.optim.Optimizer]


class WholeOnEveryProcess:
    """The base of all strategies: what a training step and a checkpoint need to know about where tensors lie."""

    scales_loss = False
    """The factor of an update's gradients is applied to the losses; otherwise to the gradients, when all are there."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.module: nn.Module
        self.wrapped: Any
        self.optimizer: Any

    @classmethod
    def fabric_strategy(
        cls,
        config: DistributedConfig,
        world_size: int,
        *,
        find_unused_parameters: bool,
        clip_norm: float,
        on_gpu: bool,
    ) -> Any:
        """Fabric's strategy for so many processes.

        Args:
            find_unused_parameters: some parameters may have no gradient in some batches.
            clip_norm: largest norm of gradients, for strategies that clip by themselves; 0 for none.
        Raises: ValueError when it cannot be had here.
        """
        from lightning.fabric.strategies.ddp import DDPStrategy

        return DDPStrategy(find_unused_parameters=find_unused_parameters) if world_size > 1 else "auto"

    def set_up(self, module: nn.Module, units: Sequence[nn.Module], make_optimizer: MakeOptimizer) -> None:
        """Take over a model and make its optimizer.

        Args:
            module: gives the loss of a batch.
            units: parts of ``module``, each called once in a forward pass, that may be spread and collected alone.
            make_optimizer: called when the parameters are what they will be.
        """
        self.module = module
        self.wrapped, self.optimizer = self.fabric.setup(module, make_optimizer())

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context of the forward and backward pass of one of an update's batches."""
        return self.fabric.no_backward_sync(self.wrapped, enabled=not last)

    def backward(self, loss: Tensor, factor: float) -> None:
        """Add a batch's gradients; ``factor`` is that of the update where ``scales_loss``, 1 otherwise."""
        self.fabric.backward(loss)

    def step(self, factor: float, limit: float) -> float:
        """Turn the sums of gradients into those of the update, and make it; returns their norm before clipping.

        Args:
            factor: what the sums are to be multiplied by, unless ``scales_loss``.
            limit: largest norm; infinite for none.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
        norm = self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        self.optimizer.step()
        return 0.0 if norm is None else float(self.whole_figure(norm))

    def whole_figure(self, value: Tensor) -> Tensor:
        """A figure of all processes, on each of them; every process must call it."""
        return value

    def evaluating(self) -> AbstractContextManager[Any]:
        """Context of passes without gradients."""
        return torch.inference_mode()

    def direct_use(self) -> AbstractContextManager[Any]:
        """Context in which parts of the model may be called outside a training step, by every process."""
        return nullcontext()

    def collected(self, value: Any) -> Any:
        """The same nested value with whole tensors, on the first process; every process must call it.

        On other processes the tensors of spread ones may be empty.
        """
        return value

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights of a part of the module, as they lie here (``collected`` them); every process must call it."""
        return dict(model.state_dict())

    def held(self, tensor: Tensor) -> Tensor | None:
        """This process's rows of a spread tensor; None for one that is whole."""
        return None

    def spread(self, value: Any, template: Any) -> Any:
        """A whole tensor laid out as a template of its shape is; anything else as it is."""
        return value

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Take whole weights. Raises: RuntimeError when names or shapes differ."""
        model.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Any]:
        """State of the optimizer as ``torch.optim`` gives it, with tensors as they lie here (``collected`` them)."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take a state with whole tensors. Raises: ValueError or KeyError when it is another optimizer's."""
        self.optimizer.load_state_dict(state)

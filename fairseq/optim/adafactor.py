"""Adafactor (Shazeer and Stern, arXiv 1804.04235)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def _rms(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor) / math.sqrt(max(tensor.numel(), 1))
    return norm


class Adafactor(torch.optim.Optimizer):
    """The second moments of a matrix are kept as a row and a column: memory for N + M numbers instead of N * M.

    Args:
        lr: step size; unused with ``relative_step``, which takes min(0.01, 1 / sqrt(t)), sec. 9 of the paper.
        eps: least squared gradient; least root mean square of a parameter.
        clip_threshold: largest root mean square of an update before the step size, sec. 6.
        decay_rate: the second moments keep 1 - t ** decay_rate of their past, sec. 7.2.
        beta1: weight of the running mean of updates, or None for none.
        scale_parameter: multiply the step by each parameter's root mean square, sec. 8.
        warmup_init: with ``relative_step``, take min(1e-6 * t, 1 / sqrt(t)).
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        *,
        lr: float,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Parameter, group: dict[str, Any]) -> None:
        assert param.grad is not None
        assert not param.grad.is_sparse, "sparse gradients"
        wide = torch.promote_types(param.dtype, torch.float32)  # squares of half-precision gradients underflow
        grad, weight = param.grad.to(wide), param.to(wide)
        state = self.state[param]
        if not state:
            self._begin(state, grad, group)
        state["step"] += 1
        step = state["step"]

        keep = 1 - step ** group["decay_rate"]
        square = grad.square().add_(group["eps"][0])
        if "row" in state:
            row, column = state["row"], state["column"]
            row.lerp_(square.mean(dim=-1), 1 - keep)
            column.lerp_(square.mean(dim=-2), 1 - keep)
            # The outer product of row and column over their common sum, with means for sums: the factors cancel.
            update = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
            update.mul_(grad)
        else:
            state["square"].lerp_(square, 1 - keep)
            update = state["square"].rsqrt().mul_(grad)

        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
        step_size = self._step_size(step, weight, group)
        update.mul_(step_size)
        if group["beta1"] is not None:
            update = state["mean"].lerp_(update, 1 - group["beta1"])
        param.copy_(weight - weight * (group["weight_decay"] * step_size) - update)

    @staticmethod
    def _begin(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> None:
        state["step"] = 0
        if grad.dim() >= 2:
            state["row"] = grad.new_zeros(grad.shape[:-1])
            state["column"] = grad.new_zeros(grad.shape[:-2] + grad.shape[-1:])
        else:
            state["square"] = torch.zeros_like(grad)
        if group["beta1"] is not None:
            state["mean"] = torch.zeros_like(grad)

    @staticmethod
    def _step_size(step: int, weight: Tensor, group: dict[str, Any]) -> float | Tensor:
        size: float | Tensor = group["lr"]
        if group["relative_step"]:
            size = min(1e-6 * step if group["warmup_init"] else 1e-2, 1 / math.sqrt(step))
        if group["scale_parameter"]:
            size = size * _rms(weight).clamp_(min=group["eps"][1])
        return size

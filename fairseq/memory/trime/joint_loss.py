"""TRIME's training loss over the positions of a batch, exact, in memory linear in their number.

It equals ``scoring.joint_nll(...).sum()`` over a similarity matrix and a mask that are never made.

Shapes: N positions, M memories from elsewhere, D key width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq.memory.similarity import lifted
from fairseq.memory.trime.streaming import Gradients, InBatchMemory, accumulate_strips, begin, end
from fairseq.memory.trime.strip_gradients import EagerStripGradient
from fairseq.memory.trime.symmetric import accumulate_symmetric
from fairseq.memory.trime.topk_loss import topk_loss
from fairseq.memory.types import Metric

__all__ = ["InBatchMemory", "joint_loss"]


class NeedsGrad(NamedTuple):
    """Inputs of the loss that need a gradient."""

    key: bool
    logp: bool
    norm: bool
    other: bool


Computed = tuple[Tensor, list["Tensor | None"]]
Compute = Callable[[InBatchMemory, NeedsGrad, Tensor, Tensor, Tensor, "Tensor | None"], Computed]


def joint_loss(
    key_ND: Tensor,
    lm_logp_N: Tensor,
    lm_norm_N: Tensor,
    memory: InBatchMemory,
    other_key_MD: Tensor | None = None,
) -> Tensor:
    """TRIME's training loss: -log of the targets' share when vocabulary and memory are normalised together, summed.

    Memory is linear in the number of positions. Differentiable once.

    Args:
        key_ND: queries and keys at once; types narrower than float32 are summed in float32.
        lm_logp_N: the language model's log-probability of each target.
        lm_norm_N: the log-sum of its scores (adaptive softmax: of its head).
        memory: values of the memories, their similarity, and which positions see them.
        other_key_MD: keys of memories from other ranks (``memory.other_token_M``).
    Returns: a scalar. A position that sees no memory contributes exactly ``-lm_logp``.
    Source: arXiv 2205.12674, sec. 3 and 4.

    ```python
    states_ND = torch.randn(8, 16, requires_grad=True)
    loss = joint_loss(states_ND, torch.full((8,), -4.0), torch.zeros(8), in_batch)
    loss.backward()
    ```
    """
    compute: Compute = compute_eager
    if key_ND.is_cuda and importlib.util.find_spec("triton") is not None:
        from fairseq.memory.trime.triton_kernels import compute_on_gpu

        compute = compute_on_gpu
        narrows = memory.metric == Metric.IP and torch.is_autocast_enabled("cuda")
        if narrows:  # a layer norm leaves float32, whose products are many times slower
            key_ND = key_ND.to(torch.get_autocast_dtype("cuda"))
    return apply(compute, key_ND, lm_logp_N, lm_norm_N, memory, other_key_MD)


def apply(
    compute: Compute,
    key_ND: Tensor,
    lm_logp_N: Tensor,
    lm_norm_N: Tensor,
    memory: InBatchMemory,
    other_key_MD: Tensor | None,
) -> Tensor:
    """:func:`joint_loss` by a given way to compute it."""
    if memory.metric == Metric.L2:
        key_ND, other_key_MD = _lift(key_ND, other_key_MD)
    num_memories = len(key_ND) + (0 if other_key_MD is None else len(other_key_MD))
    if memory.topk is not None and memory.topk < num_memories:
        return topk_loss(key_ND, lm_logp_N, lm_norm_N, memory, other_key_MD)
    inputs = (key_ND, lm_logp_N, lm_norm_N, other_key_MD)
    needs_grad = NeedsGrad(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs))
    result: Tensor = _JointLoss.apply(compute, memory, needs_grad, *inputs)  # type: ignore[no-untyped-call]
    return result


def _lift(key_ND: Tensor, other_key_MD: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys whose products are minus the squared distances; in float32 at least, as lengths lose more than products."""
    wide = torch.promote_types(key_ND.dtype, torch.float32)
    key_ND = key_ND.to(wide)
    with torch.no_grad():  # neither changes a distance
        center_D = key_ND.mean(0) if len(key_ND) else key_ND.new_zeros(key_ND.shape[1])
        radius = (key_ND - center_D).square().sum().div(max(1, len(key_ND))).sqrt().clamp_(min=1.0)
    other = None if other_key_MD is None else lifted(other_key_MD.to(wide), center_D, radius)
    return lifted(key_ND, center_D, radius), other


class _JointLoss(torch.autograd.Function):
    """Gradients are computed along with the loss, where all they need is at hand; backward scales them."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, memory: InBatchMemory, needs_grad: NeedsGrad, *inputs: Any) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            total, gradients = compute(memory, needs_grad, *inputs)
        for gradient in (gradients[0], gradients[3]) if memory.metric == Metric.L2 else ():
            if gradient is not None:
                gradient[:, -1].neg_()  # the products were taken with conjugate rows
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes)
        if not grad.is_cuda and grad == 1:  # a loss on its own: spare a copy as large as the keys
            return None, None, None, *(None if x is None else x.to(dtype) for x, dtype in saved)
        return None, None, None, *(None if x is None else (x * grad).to(dtype) for x, dtype in saved)


def compute_eager(
    memory: InBatchMemory,
    needs_grad: NeedsGrad,
    key_ND: Tensor,
    lm_logp_N: Tensor,
    lm_norm_N: Tensor,
    other_key_MD: Tensor | None,
) -> Computed:
    """The loss, and its gradients with respect to the four tensors (None where not wanted), on any device."""
    wide = torch.promote_types(key_ND.dtype, torch.float32)
    key_ND, logp_N, norm_N = key_ND.to(wide), lm_logp_N.to(wide), lm_norm_N.to(wide)
    other_key_MD = None if other_key_MD is None else other_key_MD.to(wide)
    if memory.rule.earlier and memory.rule.later and other_key_MD is None:
        found = accumulate_symmetric(memory, key_ND, logp_N, norm_N, needs_grad.key)
        if found is not None:
            return found
    gradients = Gradients(
        torch.zeros_like(key_ND) if needs_grad.key else None,
        torch.zeros_like(other_key_MD) if needs_grad.other and other_key_MD is not None else None,
    )
    sums = begin(memory, logp_N, norm_N)
    if len(key_ND):
        accumulate_strips(memory, key_ND, other_key_MD, EagerStripGradient(sums, memory.rule), gradients)
    total, logp_grad_N, norm_grad_N = end(sums, logp_N)
    return total, [gradients.key_ND, logp_grad_N, norm_grad_N, gradients.other_MD]

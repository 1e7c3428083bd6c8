"""The gradient of the kNN-LM mixture, whose forward pass is computed in place.

Shapes: B sequences, L positions with scores, R = B * L rows, V vocabulary, N rows with a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixedScores:
    """Log-probabilities of the mixture."""

    logp_BLV: Tensor
    """Of the vocabulary, in the type of the model's logits."""
    has_memory_R: Tensor
    """bool: rows that neighbours were mixed into; the others are the model's own log-probabilities."""
    target_logp_N: Tensor | None = None
    """float32, of the targets that count; None for a call without labels."""
    rows_N: Tensor | None = None
    """int64: their rows."""
    target_N: Tensor | None = None
    """int64: the tokens."""


class _Mixture(torch.autograd.Function):
    """log((1 - w) softmax(logits) + w p_memory), with p_memory a constant.

    Source: derivative of arXiv 1911.00172, eq. 3.
    """

    @staticmethod
    def forward(ctx: Any, logits_BLV: Tensor, mixed: MixedScores, weight: float) -> tuple[Tensor, Tensor]:
        target_logp_N = logits_BLV.new_empty(0) if mixed.target_logp_N is None else mixed.target_logp_N
        ctx.weight = weight
        ctx.save_for_backward(logits_BLV, mixed.logp_BLV, mixed.has_memory_R, mixed.rows_N, mixed.target_N)
        return mixed.logp_BLV, target_logp_N

    @staticmethod
    def backward(ctx: Any, grad_BLV: Tensor, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_BLV, mixed_BLV, has_memory_R, rows_N, target_N = ctx.saved_tensors
        vocabulary = logits_BLV.shape[-1]
        lm_logp_RV = torch.log_softmax(logits_BLV.reshape(-1, vocabulary).float(), 1)
        grad_RV = grad_BLV.reshape(-1, vocabulary).float().clone()
        if rows_N is not None:
            grad_RV.index_put_((rows_N, target_N), grad_N.float(), accumulate=True)
        # The share of the language model in each probability: 1 where no neighbour holds the token.
        log_left = math.log1p(-ctx.weight) if ctx.weight < 1.0 else -math.inf
        left_R1 = torch.where(has_memory_R, log_left, 0.0)[:, None]
        share_RV = (left_R1 + lm_logp_RV - mixed_BLV.reshape(-1, vocabulary).float()).clamp_(max=0.0).exp_()
        grad_RV *= share_RV
        grad_RV -= lm_logp_RV.exp_() * grad_RV.sum(1, keepdim=True)
        return grad_RV.view_as(logits_BLV).to(logits_BLV.dtype), None, None


def with_gradient(logits_BLV: Tensor, mixed: MixedScores, weight: float) -> tuple[Tensor, Tensor | None]:
    """The mixture's log-probabilities and those of the targets, through which gradients flow into the logits."""
    logp_BLV, target_logp_N = _Mixture.apply(logits_BLV, mixed, weight)  # type: ignore[no-untyped-call]
    return logp_BLV, None if mixed.target_logp_N is None else target_logp_N

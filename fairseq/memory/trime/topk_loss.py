"""TRIME's joint loss where a position sees only its most similar memories, in one product and linear memory.

The similarities are computed once, strip by strip, and all but the largest of each row are forgotten. What is left are
N * K pairs: the loss is ``scoring.joint_nll`` over them, and the keys' gradients are sums over them.

Shapes: N positions, M memories (those from elsewhere first), K of them kept, D key width; P = N * K pairs; R rows and W
columns of a strip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from fairseq.memory.scoring import joint_nll
from fairseq.memory.similarity import conjugate
from fairseq.memory.trime.streaming import Gradients, InBatchMemory, can_widen, score_strips


def topk_loss(
    key_ND: Tensor, lm_logp_N: Tensor, lm_norm_N: Tensor, memory: InBatchMemory, other_key_MD: Tensor | None
) -> Tensor:
    """``joint_loss.joint_loss`` with ``memory.topk``."""
    with torch.autocast(key_ND.device.type, enabled=False):
        wide = torch.promote_types(key_ND.dtype, torch.float32)
        with torch.no_grad():
            narrow = key_ND.dtype if can_widen(key_ND) else wide  # to choose by, a GPU's fast products will do
            other = None if other_key_MD is None else other_key_MD.to(narrow)
            score_NK, id_NK = nearest(memory, key_ND.to(narrow), other)
        query_ND, key_MD = conjugate(key_ND, memory.metric).to(wide), key_ND.to(wide)
        token_M = memory.token_N
        if other_key_MD is not None and memory.other_token_M is not None:
            key_MD = torch.cat([other_key_MD.to(wide), key_MD])
            token_M = torch.cat([memory.other_token_M, token_M])
        score_NK = _PairScores.apply(query_ND, key_MD, score_NK, id_NK, memory.scale)  # type: ignore[no-untyped-call]
        is_hit_NK = token_M[id_NK] == memory.token_N[:, None]
        keep_NK = ~torch.isneginf(score_NK)
        return joint_nll(lm_logp_N.to(wide), lm_norm_N.to(wide), score_NK, keep_NK, is_hit_NK).sum()


def nearest(memory: InBatchMemory, key_ND: Tensor, other_key_MD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores and numbers of each position's most similar memories, (N, K); -inf where it sees fewer."""
    assert memory.topk is not None, "all memories are wanted"
    num_other = 0 if other_key_MD is None else len(other_key_MD)
    shape = (len(key_ND), min(memory.topk, num_other + len(key_ND)))
    score_NK = torch.full(
        shape, -torch.inf, dtype=torch.promote_types(key_ND.dtype, torch.float32), device=key_ND.device
    )
    id_NK = torch.zeros(shape, dtype=torch.int64, device=key_ND.device)
    if not len(key_ND):
        return score_NK, id_NK
    visible = memory.rule.visible(memory.lengths, key_ND.device)
    for strip, _, score_RW in score_strips(memory, key_ND, other_key_MD, Gradients(None, None)):
        left = num_other - strip.low
        mixed_RW = score_RW[:, left + strip.mixed[0] : left + strip.mixed[1]]
        mixed_RW.masked_fill_(~visible.mask(strip.rows, slice(*strip.mixed)), -torch.inf)
        # 2.9 ns an element; maxima of groups of columns first, then the best groups alone, took as long.
        best_RK, column_RK = score_RW.topk(min(shape[1], score_RW.shape[1]), dim=1, sorted=False)
        score_NK[strip.rows, : best_RK.shape[1]] = best_RK
        id_NK[strip.rows, : best_RK.shape[1]] = column_RK + strip.low * (column_RK >= num_other)
    return score_NK, id_NK


class _PairScores(torch.autograd.Function):
    """The scaled products of queries and keys that were kept; their gradients touch the kept pairs only."""

    @staticmethod
    def forward(ctx: Any, query_ND: Tensor, key_MD: Tensor, score_NK: Tensor, id_NK: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query_ND, key_MD, id_NK)
        ctx.scale = scale
        return score_NK.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Any, ...]:
        query_ND, key_MD, id_NK = ctx.saved_tensors
        if not id_NK.numel():
            return torch.zeros_like(query_ND), torch.zeros_like(key_MD), None, None, None
        k = id_NK.shape[1]
        weight_P, id_P = grad_NK.flatten() * ctx.scale, id_NK.flatten()
        query_grad = key_grad = None
        if ctx.needs_input_grad[0]:
            query_grad = sum_of_rows(key_MD, id_P, weight_P, torch.arange(0, len(id_P), k, device=id_P.device))
        if ctx.needs_input_grad[1]:
            order_P = torch.argsort(id_P, stable=True)
            count_M = torch.bincount(id_P, minlength=len(key_MD))
            key_grad = sum_of_rows(query_ND, order_P // k, weight_P[order_P], count_M.cumsum(0) - count_M)
        return query_grad, key_grad, None, None, None


def sum_of_rows(rows_ND: Tensor, id_P: Tensor, weight_P: Tensor, first_M: Tensor) -> Tensor:
    """Weighted sums of rows, (M, D): the m-th one over the pairs from ``first[m]`` up to the next."""
    return embedding_bag(id_P, rows_ND, first_M, mode="sum", per_sample_weights=weight_P)

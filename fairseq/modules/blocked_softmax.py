"""Softmax over a large vocabulary whose scores are computed block by block, each while the last one is in the cache.

Scores of all types at once are 200 MB for 1,024 positions and 50,000 types: they leave the cache before the softmax
reads them, and a product with so wide a result runs at 115 of the 190 billion operations a second that blocks of 1,024
types reach on two cores. Shapes: N positions, D width, V types, K types of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq.modules.inference_linear import is_plain_float32

_BLOCK_SCORES = 1 << 20  # 4 MB: what the products of two threads leave in a cache that is shared
_SMALLEST_BLOCK = 1024  # narrower products lose more than a smaller block gains


def fits(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """True where :func:`target_logp` is faster than a product and a softmax: float32 on a CPU, more than one block."""
    return is_plain_float32(hidden_ND, weight_VD) and _block_size(len(hidden_ND), len(weight_VD)) < len(weight_VD)


def target_logp(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T), and the log-sum of its scores; both (N,).

    With gradients the exponentials of all scores are kept, (N, V) once; without, those of one block.
    """
    result: tuple[Tensor, Tensor] = _TargetLogp.apply(hidden_ND, weight_VD, target_N)  # type: ignore[no-untyped-call]
    return result


class _TargetLogp(torch.autograd.Function):
    """See :func:`target_logp`.

    A block keeps e = exp(score - largest of its row and block), which its sum needs anyway. A probability is then
    e * exp(largest - norm): the second factor belongs to a row and block, so that the backward pass scales vectors of
    width D instead of blocks of scores.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        num_types, size = len(weight_VD), _block_size(len(hidden_ND), len(weight_VD))
        if bool(((target_N < 0) | (target_N >= num_types)).any()):
            raise IndexError(f"a target is not in [0, {num_types})")
        blocks = list(_blocks(num_types, size))
        keeps = any(ctx.needs_input_grad[:2])
        room = hidden_ND.new_empty(len(hidden_ND) * (num_types if keeps else size))
        largest_KN, sums_KN = hidden_ND.new_empty(2, len(blocks), len(hidden_ND))
        score_N = hidden_ND.new_zeros(len(hidden_ND))
        for number, (start, end) in enumerate(blocks):
            e_NK = _block_of(room, start if keeps else 0, len(hidden_ND), end - start)
            torch.mm(hidden_ND, weight_VD[start:end].t(), out=e_NK)
            here_N = (target_N >= start) & (target_N < end)
            place_N1 = (target_N - start).clamp_(0, end - start - 1)[:, None]
            score_N = torch.where(here_N, e_NK.gather(1, place_N1)[:, 0], score_N)
            torch.amax(e_NK, 1, out=largest_KN[number])
            e_NK.sub_(largest_KN[number][:, None]).exp_()
            torch.sum(e_NK, 1, out=sums_KN[number])
        norm_N = torch.logsumexp(largest_KN + sums_KN.log(), 0)
        if keeps:
            ctx.save_for_backward(hidden_ND, weight_VD, target_N, room, largest_KN, norm_N)
        return (score_N - norm_N).clamp_(max=0), norm_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logp_grad_N: Tensor, norm_grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, target_N, room, largest_KN, norm_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        num_rows, num_types = len(hidden_ND), len(weight_VD)
        scale_KN = (largest_KN - norm_N).exp_() * (norm_grad_N - logp_grad_N)
        hidden_grad = weight_VD[target_N].mul_(logp_grad_N[:, None]) if wants_hidden else None
        weight_grad = torch.empty_like(weight_VD) if wants_weight else None
        for (start, end), scale_N in zip(_blocks(num_types, _block_size(num_rows, num_types)), scale_KN):
            e_NK = _block_of(room, start, num_rows, end - start)
            if hidden_grad is not None:
                hidden_grad.addcmul_(e_NK @ weight_VD[start:end], scale_N[:, None])
            if weight_grad is not None:
                torch.mm(e_NK.t(), hidden_ND * scale_N[:, None], out=weight_grad[start:end])
        if weight_grad is not None:
            weight_grad.index_add_(0, target_N, hidden_ND * logp_grad_N[:, None])
        return hidden_grad, weight_grad, None


def _block_size(num_rows: int, num_types: int) -> int:
    """Types of a block."""
    return min(num_types, max(_SMALLEST_BLOCK, _BLOCK_SCORES // max(1, num_rows)))


def _blocks(num_types: int, size: int) -> Iterator[tuple[int, int]]:
    """First type of each block, and the one after its last."""
    return ((start, min(start + size, num_types)) for start in range(0, num_types, size))


def _block_of(room: Tensor, start: int, num_rows: int, width: int) -> Tensor:
    """The block of scores that begins at a type, in memory for all scores."""
    return room[start * num_rows : (start + width) * num_rows].view(num_rows, width)

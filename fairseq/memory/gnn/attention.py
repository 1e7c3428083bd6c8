"""The two attentions over neighbours, with gradients that gather once more instead of keeping what was gathered.

Shapes: N nodes or tokens, M sources, K neighbours of a token, H heads, C width of a head, D width of a state, S = 3
sources of a node at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.runtime.threads import run_in_threads

_TOKENS_PER_TASK = 64  # to start a thread takes as long as some dozens

_CHUNK_NUMBERS = 1 << 18
"""Gathered numbers at a time: 1 MB in float32. Half of the time of four times as many, which leave the cache before
the second product reads them; with an eighth as many, calls take as long as products."""


def banded_attention(
    query_NHC: Tensor, key_MHC: Tensor, value_MHC: Tensor, source_NS: Tensor, has_NS: Tensor, dropout: float = 0.0
) -> Tensor:
    """Each node's mean of its sources' values, (N, H, C), weighted by the softmax of query times key.

    Source: arXiv 2110.08743, eq. 3 to 6, for the edges between neighbours.

    Args:
        query_NHC: scaled already.
        source_NS: int64 rows of the sources.
        has_NS: False for sources that do not exist; every node has one at least.
        dropout: share of the weights set to zero; the others grow by 1 / (1 - dropout).
    """
    scale_NSH = _dropout_scale((*source_NS.shape, query_NHC.shape[1]), dropout, query_NHC)
    inputs = (query_NHC, key_MHC, value_MHC, source_NS, has_NS, scale_NSH)
    out_NHC: Tensor = _Banded.apply(*inputs)  # type: ignore[no-untyped-call]
    return out_NHC


def neighbor_attention(
    query_NHD: Tensor, state_MD: Tensor, index_NK: Tensor, keep_NK: Tensor, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Each token's mean of its neighbours' states per head, (N, H, D), and the sum of its weights, (N, H).

    The neighbours' projections are the caller's, on both sides: a key of ``W z`` has the product ``(q W) z`` with a
    query, and values of ``W z + b`` the mean ``W mean(z) + b sum(weights)``. A token without neighbours gets zeros.

    Args:
        query_NHD: queries in the space of the states, scaled already.
        index_NK: int64 rows of the states.
        keep_NK: False for neighbours that do not count.
        dropout: as in :func:`banded_attention`.
    """
    scale_NHK = _dropout_scale((len(query_NHD), query_NHD.shape[1], index_NK.shape[1]), dropout, query_NHD)
    inputs = (query_NHD, state_MD, index_NK, keep_NK, scale_NHK)
    mean_NHD, sum_NH = _Neighbors.apply(*inputs)  # type: ignore[no-untyped-call]
    return mean_NHD, sum_NH


def _dropout_scale(shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor | None:
    """0 where a weight is dropped and 1 / (1 - dropout) elsewhere; None when nothing is dropped."""
    if not dropout:
        return None
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - dropout).div_(1 - dropout)


def _slices(count: int, row_numbers: int) -> list[slice]:
    step = max(1, _CHUNK_NUMBERS // max(1, row_numbers))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        query_NHC: Tensor,
        key_MHC: Tensor,
        value_MHC: Tensor,
        source_NS: Tensor,
        has_NS: Tensor,
        scale_NSH: Tensor | None,
    ) -> Tensor:
        count, heads, _ = query_NHC.shape
        weight_NSH = query_NHC.new_empty(count, source_NS.shape[1], heads)
        out_NHC = torch.empty_like(query_NHC)
        for rows in _slices(count, 2 * query_NHC[0].numel()):
            scores = [
                (query_NHC[rows] * key_MHC.index_select(0, source_N)).sum(2) for source_N in source_NS[rows].unbind(1)
            ]
            score_NSH = torch.stack(scores, 1).masked_fill_(~has_NS[rows, :, None], -torch.inf)
            weight_NSH[rows] = score_NSH.softmax(1)
            used_NSH = weight_NSH[rows] if scale_NSH is None else weight_NSH[rows] * scale_NSH[rows]
            out_NHC[rows] = 0
            for place, source_N in enumerate(source_NS[rows].unbind(1)):
                out_NHC[rows].addcmul_(used_NSH[:, place, :, None], value_MHC.index_select(0, source_N))
        ctx.save_for_backward(query_NHC, key_MHC, value_MHC, source_NS, weight_NSH, scale_NSH)
        return out_NHC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        query_NHC, key_MHC, value_MHC, source_NS, weight_NSH, scale_NSH = ctx.saved_tensors
        grad_NHC = grads[0]
        query_grad = torch.zeros_like(query_NHC)
        key_grad, value_grad = torch.zeros_like(key_MHC), torch.zeros_like(value_MHC)
        flat_key, flat_value = key_grad.flatten(1), value_grad.flatten(1)
        for rows in _slices(len(query_NHC), 4 * query_NHC[0].numel()):
            grad_R, sources, weight_RSH = grad_NHC[rows], source_NS[rows].unbind(1), weight_NSH[rows]
            used_RSH = weight_RSH if scale_NSH is None else weight_RSH * scale_NSH[rows]
            products = [(grad_R * value_MHC.index_select(0, source_N)).sum(2) for source_N in sources]
            score_grad_RSH = _softmax_grad(torch.stack(products, 1), weight_RSH, scale_NSH, rows, dim=1)
            for place, source_N in enumerate(sources):
                flat_value.index_add_(0, source_N, (used_RSH[:, place, :, None] * grad_R).flatten(1))
                score_R = score_grad_RSH[:, place, :, None]
                query_grad[rows].addcmul_(score_R, key_MHC.index_select(0, source_N))
                flat_key.index_add_(0, source_N, (score_R * query_NHC[rows]).flatten(1))
        return query_grad, key_grad, value_grad, None, None, None


class _Neighbors(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, query_NHD: Tensor, state_MD: Tensor, index_NK: Tensor, keep_NK: Tensor, scale_NHK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        count, heads, dim = query_NHD.shape
        weight_NHK = query_NHD.new_empty(count, heads, index_NK.shape[1])
        mean_NHD, sum_NH = torch.empty_like(query_NHD), query_NHD.new_empty(count, heads)
        if scale_NHK is None and _has_kernel(query_NHD, state_MD):
            _attend_compiled(query_NHD, state_MD, index_NK, keep_NK, weight_NHK, mean_NHD)
            ctx.save_for_backward(query_NHD, state_MD, index_NK, weight_NHK, scale_NHK)
            return mean_NHD, weight_NHK.sum(2)
        for rows in _slices(count, index_NK.shape[1] * dim):
            state_RKD = _gathered(state_MD, index_NK[rows], query_NHD.dtype)
            score_RHK = query_NHD[rows] @ state_RKD.transpose(1, 2)
            score_RHK.masked_fill_(~keep_NK[rows, None], -torch.inf)
            weight_RHK = score_RHK.softmax(2).masked_fill_(~keep_NK[rows, None], 0.0)  # a row of none is NaN before
            weight_NHK[rows] = weight_RHK
            used_RHK = weight_RHK if scale_NHK is None else weight_RHK * scale_NHK[rows]
            mean_NHD[rows] = used_RHK @ state_RKD
            sum_NH[rows] = used_RHK.sum(2)
        ctx.save_for_backward(query_NHD, state_MD, index_NK, weight_NHK, scale_NHK)
        return mean_NHD, sum_NH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        query_NHD, state_MD, index_NK, weight_NHK, scale_NHK = ctx.saved_tensors
        mean_grad_NHD, sum_grad_NH = grads
        query_grad = torch.empty_like(query_NHD)
        state_grad = torch.zeros_like(state_MD) if ctx.needs_input_grad[1] else None
        for rows in _slices(len(query_NHD), 2 * index_NK.shape[1] * query_NHD.shape[2]):
            state_RKD = _gathered(state_MD, index_NK[rows], query_NHD.dtype)
            used_RHK = weight_NHK[rows] if scale_NHK is None else weight_NHK[rows] * scale_NHK[rows]
            weight_grad_RHK = mean_grad_NHD[rows] @ state_RKD.transpose(1, 2) + sum_grad_NH[rows, :, None]
            score_grad_RHK = _softmax_grad(weight_grad_RHK, weight_NHK[rows], scale_NHK, rows, dim=2)
            query_grad[rows] = score_grad_RHK @ state_RKD
            if state_grad is not None:
                left_RKH = torch.cat([used_RHK, score_grad_RHK], 1).transpose(1, 2)
                grad_RKD = left_RKH @ torch.cat([mean_grad_NHD[rows], query_NHD[rows]], 1)
                state_grad.index_add_(0, index_NK[rows].flatten(), grad_RKD.flatten(0, 1).to(state_grad.dtype))
        return query_grad, state_grad, None, None, None


def _has_kernel(query: Tensor, state: Tensor) -> bool:
    return query.device.type == state.device.type == "cpu" and query.dtype == state.dtype == torch.float32


def _attend_compiled(
    query_NHD: Tensor, state_MD: Tensor, index_NK: Tensor, keep_NK: Tensor, weight_NHK: Tensor, mean_NHD: Tensor
) -> None:
    """The compiled loop, a third of the time of gathering states first (256 tokens, 32 neighbours, width 256)."""
    from fairseq.memory.gnn.kernels import attend_neighbors

    given = [x.detach().contiguous().numpy() for x in (query_NHD, state_MD, index_NK, keep_NK)]
    query, state, index, keep = given
    weight, mean = weight_NHK.numpy(), mean_NHD.numpy()
    step = max(_TOKENS_PER_TASK, -(-len(query) // max(1, 2 * torch.get_num_threads())))

    def attend(rows: slice) -> None:
        attend_neighbors(query[rows], state, index[rows], keep[rows], weight[rows], mean[rows])

    run_in_threads(attend, [slice(start, start + step) for start in range(0, len(query), step)])


def _gathered(state_MD: Tensor, index_RK: Tensor, dtype: torch.dtype) -> Tensor:
    return state_MD.index_select(0, index_RK.flatten()).view(*index_RK.shape, -1).to(dtype)


def _softmax_grad(grad: Tensor, weight: Tensor, scale: Tensor | None, rows: slice, dim: int) -> Tensor:
    """Gradient of the scores from that of the used weights, along ``dim``."""
    grad = grad if scale is None else grad * scale[rows]
    return weight * (grad - (weight * grad).sum(dim, keepdim=True))

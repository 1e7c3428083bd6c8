"""Attention over local keys and chosen memories with one softmax, from parts that each know their normalisation.

An attention over some keys is its output and the log of its normaliser (``Partial``). Two of them make the attention
over all their keys, so local attention may run in torch's fused kernels, and memories cost a [query, k] axis only.

Shapes: B rows of a batch, H query heads, G key-value heads, T queries, L local keys, S memories, K chosen, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.memory.extended_mind.cache import LayerMemory

_PLAIN_SCORES = 16 << 20  # held at a time by plain local attention


@dataclass(frozen=True)
class Partial:
    """Attention over a part of the keys."""

    out_BHTD: Tensor
    """Mean of the part's values, weighted by the softmax within the part; zeros where the part is empty."""
    norm_BHT: Tensor
    """float32, log of the sum of exp(score) over the part; -inf where it is empty."""

    def joined(self, other: Partial) -> Tensor:
        """Attention over both parts, (B, H, T, D), in the type of this one."""
        # Where neither has a key (a padding position) the difference is NaN: both are zeros there, whatever the weight.
        mine_BHT1 = (self.norm_BHT - other.norm_BHT).nan_to_num(0.0).sigmoid()[..., None]
        wide = torch.promote_types(self.out_BHTD.dtype, torch.float32)
        joint_BHTD = torch.lerp(other.out_BHTD.to(wide), self.out_BHTD.to(wide), mine_BHT1.to(wide))
        return joint_BHTD.to(self.out_BHTD.dtype)


@dataclass(frozen=True)
class LocalRule:
    """The local keys that a query sees, and the map from products to scores."""

    mask_B1TL: Tensor | None
    """Boolean, true where a query may look, or numbers to add to the scores; None for all keys, or causal."""
    scale: float
    """Scores are products times this."""
    causal: bool = False
    """Without a mask: query t sees keys up to t."""
    softcap: float | None = None
    """Scores are squashed to within this, by tanh; None to leave them."""


def local_attention(query_BHTD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, rule: LocalRule) -> Partial:
    """Attention over the local keys."""
    if rule.causal and rule.mask_B1TL is None:
        num_queries = query_BHTD.shape[2]
        # An empty static cache is longer than what is in it.
        key_BGLD, value_BGLD = key_BGLD[:, :, :num_queries], value_BGLD[:, :, :num_queries]
    fused = _fused_local(query_BHTD, key_BGLD, value_BGLD, rule)
    return fused or plain_local(query_BHTD, key_BGLD, value_BGLD, rule)


def plain_local(query_BHTD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, rule: LocalRule) -> Partial:
    """:func:`local_attention` in plain operations, a slice of queries at a time."""
    length, heads, kv_heads = key_BGLD.shape[2], query_BHTD.shape[1], key_BGLD.shape[1]
    step = max(1, _PLAIN_SCORES // max(1, length * heads * len(query_BHTD)))
    outs, norms = [], []
    # Heads that share keys become more queries of theirs: keys are not repeated.
    grouped_BGETD = query_BHTD.reshape(len(query_BHTD), kv_heads, -1, *query_BHTD.shape[2:])
    for start in range(0, query_BHTD.shape[2], step):
        part_BGETD = grouped_BGETD[:, :, :, start : start + step]
        score_BGETL = torch.einsum("bgetd,bgld->bgetl", part_BGETD, key_BGLD).float() * rule.scale
        score_BHTL = _capped(score_BGETL, rule.softcap).flatten(1, 2)
        score_BHTL = _masked(score_BHTL, rule, start)
        norm_BHT = torch.logsumexp(score_BHTL, -1)
        weight_BHTL = (score_BHTL - norm_BHT[..., None]).exp().nan_to_num(0.0).to(value_BGLD.dtype)
        weight_BGETL = weight_BHTL.reshape(score_BGETL.shape)
        outs.append(torch.einsum("bgetl,bgld->bgetd", weight_BGETL, value_BGLD).flatten(1, 2))
        norms.append(norm_BHT)
    return Partial(torch.cat(outs, 2), torch.cat(norms, 2))


def _masked(score_BHTL: Tensor, rule: LocalRule, start: int) -> Tensor:
    queries, length = score_BHTL.shape[2:]
    if rule.mask_B1TL is not None:
        mask_B1TL = rule.mask_B1TL[:, :, start : start + queries, :length]
        if mask_B1TL.dtype is torch.bool:
            return score_BHTL.masked_fill(~mask_B1TL, -torch.inf)
        # The lowest number of a type stands for minus infinity in additive masks.
        hidden_B1TL = mask_B1TL <= torch.finfo(mask_B1TL.dtype).min / 2
        return (score_BHTL + mask_B1TL.float()).masked_fill(hidden_B1TL, -torch.inf)
    if rule.causal:
        at_T = torch.arange(start, start + queries, device=score_BHTL.device)
        return score_BHTL.masked_fill(torch.arange(length, device=at_T.device) > at_T[:, None], -torch.inf)
    return score_BHTL


def _fused_local(query_BHTD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, rule: LocalRule) -> Partial | None:
    """By torch's kernels that return the normaliser, on a CPU or a GPU; None where they do not apply."""
    mask_B1TL, queries = rule.mask_B1TL, query_BHTD.shape[2]
    width_differs = query_BHTD.shape[-1] != value_BGLD.shape[-1]
    needs_gradient = any(x.requires_grad for x in (query_BHTD, key_BGLD, value_BGLD)) and torch.is_grad_enabled()
    if rule.softcap is not None or width_differs or needs_gradient or query_BHTD.device.type not in ("cpu", "cuda"):
        return None
    shared = query_BHTD.shape[1] // key_BGLD.shape[1]
    packed = queries == 1 and shared > 1 and (mask_B1TL is None or mask_B1TL.shape[1] == 1)
    if packed:
        query_BHTD = query_BHTD.reshape(len(query_BHTD), key_BGLD.shape[1], shared, -1)
    elif shared > 1:
        key_BGLD, value_BGLD = (x.repeat_interleave(shared, 1) for x in (key_BGLD, value_BGLD))
    causal = rule.causal and mask_B1TL is None
    bias = mask_B1TL
    if bias is not None:
        bias = bias[..., : key_BGLD.shape[2]]
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=query_BHTD.dtype).masked_fill_(~bias, -torch.inf)
        bias = bias.expand(len(query_BHTD), -1, query_BHTD.shape[2], -1)
    if query_BHTD.device.type == "cpu":
        out_BHTD, norm_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BHTD, key_BGLD, value_BGLD, 0.0, causal, attn_mask=bias, scale=rule.scale
        )
    elif bias is None:
        out_BHTD, norm_BHT = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_BHTD, key_BGLD, value_BGLD, None, True, 0.0, causal, scale=rule.scale
        )[:2]
        norm_BHT = norm_BHT[..., : query_BHTD.shape[2]]  # filled up to a multiple of 32
    else:
        return None
    norm_BHT = norm_BHT.float()
    if bias is not None:
        # A row that sees nothing comes out as NaN, or as a mean of everything when the mask holds lowest numbers.
        sees_B1T = (bias > torch.finfo(query_BHTD.dtype).min / 2).any(-1)
        norm_BHT = norm_BHT.masked_fill(~sees_B1T, -torch.inf)
        out_BHTD = out_BHTD.masked_fill(~sees_B1T[..., None], 0.0)
    if packed:
        out_BHTD, norm_BHT = out_BHTD.flatten(1, 2)[:, :, None], norm_BHT.flatten(1, 2)[:, :, None]
    return Partial(out_BHTD, norm_BHT)


def memory_scores(
    query_BHTD: Tensor, key_BHTKD: Tensor, scale: float, bias_BHTK: Tensor | None, softcap: float | None
) -> Tensor:
    """Scores of chosen memories, (B, H, T, K) float32: products of the vectors as they are, not of their directions."""
    product_BHTK = torch.einsum("bhtd,bhtkd->bhtk", query_BHTD.float(), key_BHTKD.float())
    score_BHTK = _capped(product_BHTK * scale, softcap)
    return score_BHTK if bias_BHTK is None else score_BHTK + bias_BHTK


def memory_attention(score_BHTK: Tensor, value_BHTKD: Tensor) -> Partial:
    """Attention over selected memories, whose scores are -inf where they are dropped."""
    norm_BHT = torch.logsumexp(score_BHTK, -1) if score_BHTK.shape[-1] else score_BHTK.new_full((1, 1, 1), -torch.inf)
    weight_BHTK = (score_BHTK - norm_BHT[..., None]).exp().nan_to_num(0.0)
    return Partial(torch.einsum("bhtk,bhtkd->bhtd", weight_BHTK, value_BHTKD.float()), norm_BHT)


def gathered(layer: LayerMemory, ids_BHTK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of chosen memories, (B, H, T, K, D) each; those of memory 0 where the id is -1."""
    heads_each = ids_BHTK.shape[1] // layer.key_GSD.shape[0]
    head_H = torch.arange(ids_BHTK.shape[1], device=ids_BHTK.device) // heads_each
    row_BHTK = ids_BHTK.clamp(min=0) + (head_H * len(layer))[:, None, None]
    rows = row_BHTK.reshape(-1)

    def taken(x_GSD: Tensor) -> Tensor:
        return x_GSD.flatten(0, 1).index_select(0, rows).reshape(*row_BHTK.shape, -1)

    return taken(layer.key_GSD), taken(layer.value_GSD)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap

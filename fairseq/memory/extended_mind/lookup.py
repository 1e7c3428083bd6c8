"""Memory attention for one layer: retrieve, score, attend, and report which user tokens were retrieved.

Shapes: B rows, H query heads, G key-value heads, T queries, K chosen, S memories, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.extended_mind.attention import Partial, gathered, memory_attention, memory_scores
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.search import SEARCHES, KernelSearch, Search, are_worth_threads
from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.types import Array
from fairseq.runtime.threads import run_in_threads

_QUERIES_OF_A_START = 8 << 10  # as much work as it takes to get threads going


@dataclass(frozen=True)
class SelectedMemories:
    """Memories that the queries of one layer attended to, best first."""

    token_BHTK: Tensor
    """int64, which of the user's tokens; -1 where there were fewer than K memories."""
    similarity_BHTK: Tensor
    """float32 cosine similarity."""
    score_BHTK: Tensor
    """float32 score in the softmax; -inf where it was dropped for its similarity."""
    norm_BHT: Tensor
    """float32, log of the sum of exp(score) over memories and local keys."""

    def weights(self) -> Tensor:
        """Share of the attention that each got, (B, H, T, K)."""
        return (self.score_BHTK - self.norm_BHT[..., None]).exp()


@dataclass(frozen=True)
class RetrievedMemories:
    """Memories that a layer read: as in ``SelectedMemories``, numbered as memories."""

    ids_BHTK: Tensor
    similarity_BHTK: Tensor
    score_BHTK: Tensor


@dataclass(frozen=True)
class MemoryAttention:
    """Attention of a layer's queries to its memories."""

    partial: Partial
    read: Callable[[], RetrievedMemories]
    """The memories that were retrieved; called only where they are recorded."""


@dataclass(frozen=True)
class ScoreRule:
    """The map from products to scores of memories."""

    scale: float
    softcap: float | None = None
    slope_H: Tensor | None = None
    """ALiBi: how much a step to the left takes off a score; None without."""
    before_B: Tensor | None = None
    """With ALiBi: how far the place before the local text is from its last key's, as a number <= 0."""


class LayerLookup:
    """The memories of one layer, ready to be searched."""

    def __init__(self, memory: Memory, layer: int, settings: MindSettings) -> None:
        """Prepare the search."""
        self.layer: LayerMemory = memory.layers[layer]
        self.device = self.layer.key_GSD.device
        self.place_S, self.offset_S = memory.place_S, memory.offsets()
        self.search: Search = SEARCHES[settings.memory_type](self.layer.key_GSD, settings)
        # Compiled loops read float32; other types are attended to by torch.
        self.compiled = self.device.type == "cpu" and self.layer.key_GSD.dtype is torch.float32
        self._few = self.search if self.compiled and isinstance(self.search, KernelSearch) else None
        if self._few is not None:
            self._keys = (self._few.key_GSD.numpy(), self._few.inverse_GS.numpy())
            self._value_GSD: Array = self.layer.value_GSD.numpy()

    def attend(self, query_BHTD: Tensor, rule: ScoreRule, settings: MindSettings) -> MemoryAttention:
        """Attend to the nearest memories of each query."""
        rows, heads, queries = query_BHTD.shape[:3]
        kv_heads = len(self.layer.key_GSD)
        on_device_BHTD = query_BHTD.to(self.device)
        query_GND = on_device_BHTD.transpose(0, 1).reshape(kv_heads, -1, query_BHTD.shape[-1])

        def by_row(x_GN: Tensor) -> Tensor:
            return x_GN.reshape(heads, rows, queries, *x_GN.shape[2:]).transpose(0, 1)

        by_loops = rule.softcap is None and not (query_BHTD.requires_grad and torch.is_grad_enabled())
        few = self._few if by_loops and rule.slope_H is None else None
        if few is not None and few.takes_at_once(query_GND.shape[1]):
            return self._attend_to_few(few, query_GND, by_row, rule.scale, settings)
        nearest = self.search.search(query_GND.detach(), settings.topk).to(self.device)
        ids_BHTK, similarity_BHTK = by_row(nearest.ids_GNK), by_row(nearest.similarity_GNK)
        dropped_BHTK = ids_BHTK < 0
        if settings.mask_by_sim:
            dropped_BHTK = dropped_BHTK | (similarity_BHTK <= settings.sim_threshold)
        bias_BHTK = self._bias(ids_BHTK, rule)
        if self.compiled and by_loops:
            score_BHTK, partial = self._attend(on_device_BHTD, ids_BHTK, dropped_BHTK, bias_BHTK, rule.scale)
        else:
            key_BHTKD, value_BHTKD = gathered(self.layer, ids_BHTK)
            key_BHTKD, value_BHTKD = key_BHTKD.to(query_BHTD.device), value_BHTKD.to(query_BHTD.device)
            bias_BHTK = bias_BHTK.to(query_BHTD.device) if bias_BHTK is not None else None
            score_BHTK = memory_scores(query_BHTD, key_BHTKD, rule.scale, bias_BHTK, rule.softcap)
            score_BHTK = score_BHTK.masked_fill(dropped_BHTK.to(score_BHTK.device), -torch.inf)
            partial = memory_attention(score_BHTK, value_BHTKD)
        partial = Partial(partial.out_BHTD.to(query_BHTD.device), partial.norm_BHT.to(query_BHTD.device))
        return MemoryAttention(partial, lambda: RetrievedMemories(ids_BHTK, similarity_BHTK, score_BHTK))

    def _attend_to_few(
        self,
        search: KernelSearch,
        query_GND: Tensor,
        by_row: Callable[[Tensor], Tensor],
        scale: float,
        settings: MindSettings,
    ) -> MemoryAttention:
        """All of it in one compiled call: so many calls of torch would take longer than the work."""
        from fairseq.memory.extended_mind.kernels import attend_to_few

        query_GND = query_GND.detach().float().nan_to_num(0.0).contiguous()
        shape = (*query_GND.shape[:2], min(settings.topk, len(self.layer)))
        ids_GNK = np.empty(shape, np.int64)
        best_GNK, score_GNK = np.empty(shape, np.float32), np.empty(shape, np.float32)
        out_GND, norm_GN = np.empty((*shape[:2], self._value_GSD.shape[2]), np.float32), np.empty(shape[:2], np.float32)
        threshold = settings.sim_threshold if settings.mask_by_sim else -np.inf
        arrays = (*search.quantized_products(query_GND), query_GND.numpy(), *self._keys, self._value_GSD)
        attend_to_few(*arrays, scale, threshold, ids_GNK, best_GNK, score_GNK, out_GND, norm_GN)
        partial = Partial(*(by_row(torch.from_numpy(x)) for x in (out_GND, norm_GN)))
        return MemoryAttention(
            partial, lambda: RetrievedMemories(*(by_row(torch.from_numpy(x)) for x in (ids_GNK, best_GNK, score_GNK)))
        )

    def in_tokens(self, read: Callable[[], RetrievedMemories]) -> RetrievedMemories:
        """The retrieved memories, numbered by the user's tokens; -1 stays."""
        nearest = read()
        if not len(self.place_S):
            return nearest
        place_BHTK = self.place_S.to(nearest.ids_BHTK.device)[nearest.ids_BHTK.clamp(min=0)]
        return replace(nearest, ids_BHTK=place_BHTK.masked_fill(nearest.ids_BHTK < 0, -1))

    def _bias(self, ids_BHTK: Tensor, rule: ScoreRule) -> Tensor | None:
        """ALiBi's part of a score: memories stand before the first local key."""
        if rule.slope_H is None or rule.before_B is None:
            return None
        distance_BHTK = rule.before_B.to(self.device)[:, None, None, None].float()
        if self.offset_S is not None:
            distance_BHTK = distance_BHTK + self.offset_S.to(self.device)[ids_BHTK.clamp(min=0)]
        return rule.slope_H.to(self.device)[:, None, None] * distance_BHTK

    def _attend(
        self, query_BHTD: Tensor, ids_BHTK: Tensor, dropped_BHTK: Tensor, bias_BHTK: Tensor | None, scale: float
    ) -> tuple[Tensor, Partial]:
        """By compiled loops, which copy nothing."""
        from fairseq.memory.extended_mind.kernels import attend_to_selected

        rows, heads, queries, width = query_BHTD.shape
        score_BHTK = torch.zeros(ids_BHTK.shape) if bias_BHTK is None else bias_BHTK.expand(ids_BHTK.shape)
        score_HNK = score_BHTK.masked_fill(dropped_BHTK, -torch.inf).transpose(0, 1).flatten(1, 2).contiguous()
        query_HND = query_BHTD.detach().float().transpose(0, 1).reshape(heads, -1, width).contiguous()
        ids_HNK = ids_BHTK.transpose(0, 1).reshape(heads, rows * queries, -1).contiguous()
        out_HND = torch.empty(heads, rows * queries, self.layer.value_GSD.shape[-1])
        norm_HN = torch.empty(heads, rows * queries)
        arrays = tuple(x.numpy() for x in (query_HND, ids_HNK, self.layer.key_GSD, self.layer.value_GSD))
        results = tuple(x.numpy() for x in (score_HNK, out_HND, norm_HN))

        def attend(start: int) -> None:
            past = min(start + step, count)
            attend_to_selected(*arrays, scale, *results, start, past)  # type: ignore[call-arg, arg-type]

        count = rows * queries
        shared = are_worth_threads(count * heads / _QUERIES_OF_A_START)
        step = -(-count // torch.get_num_threads()) if shared else count
        run_in_threads(attend, range(0, count, max(1, step)))

        def by_row(x: Tensor) -> Tensor:
            return x.reshape(heads, rows, queries, *x.shape[2:]).transpose(0, 1)

        return by_row(score_HNK), Partial(by_row(out_HND), by_row(norm_HN))

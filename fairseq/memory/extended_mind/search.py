"""Which memories are nearest to a query: by cosine similarity, per head, the k best.

Every way gives the same memories, up to the rounding of sums; of equally near ones the earlier (a faiss index
excepted). Queries that are zero are near to nothing in particular.

Shapes: G key-value heads, N queries of each, S memories, K chosen, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.files import Array
from fairseq.memory.index.faiss_index import has_fast_int8
from fairseq.memory.similarity import normalized
from fairseq.memory.threads import ThreadBuffer, map_in_threads
from fairseq.memory.types import Metric, Neighbors

_FEW_QUERIES = 48  # of a head: below, 8-bit keys are scanned; above, blocks are multiplied
_BLOCK_SCORES = 256 << 10  # 1 MB, which stays in a core's cache
_BLOCK_COLUMNS = 4096
_GPU_SCORES = 64 << 20
_LEVELS = 127
_SHORTEST = 1e-12  # as torch.nn.functional.normalize has it


@dataclass(frozen=True)
class Found:
    """The memories nearest to each query, best first."""

    ids_GNK: Tensor
    """int64 number of the memory; -1 where there are fewer than K."""
    similarity_GNK: Tensor
    """float32 cosine similarity; -inf where the id is -1."""

    def to(self, device: torch.device) -> Found:
        """The same on another device."""
        return Found(self.ids_GNK.to(device), self.similarity_GNK.to(device))


class Search(Protocol):
    """A way to search the keys of one layer."""

    def search(self, query_GND: Tensor, k: int) -> Found:
        """The ``min(k, S)`` nearest memories of each query; queries may have any length and are on the keys' device."""
        ...


class PlainSearch:
    """Products and ``topk`` of torch, on any device."""

    def __init__(self, key_GSD: Tensor) -> None:
        """Scale keys to length one once."""
        self.unit_GSD = normalized(key_GSD.float())

    def search(self, query_GND: Tensor, k: int) -> Found:
        """See ``Search``."""
        query_GND = normalized(query_GND.float())
        size = self.unit_GSD.shape[1]
        step = max(1, _GPU_SCORES // max(1, size * len(query_GND)))
        parts = [
            torch.topk(torch.bmm(part_GND, self.unit_GSD.mT), min(k, size), dim=-1)
            for part_GND in torch.split(query_GND, step, dim=1)
        ]
        return Found(torch.cat([p.indices for p in parts], 1), torch.cat([p.values for p in parts], 1))


class KernelSearch:
    """Compiled search on a CPU: many queries by blocks of products, few by a scan of 8-bit keys and a second look."""

    def __init__(self, key_GSD: Tensor) -> None:
        """Round the keys. Takes a quarter of their size in float32, besides a copy if they are of another type."""
        self.key_GSD = key_GSD.float().contiguous()
        self.inverse_GS = 1.0 / torch.linalg.vector_norm(self.key_GSD, dim=-1).clamp_(min=_SHORTEST)
        self.low = [_LowKeys(*head) for head in zip(self.key_GSD, self.inverse_GS)]
        self._buffer = ThreadBuffer(_BLOCK_SCORES, torch.float32)
        self._integers = ThreadBuffer(_BLOCK_SCORES, torch.int32)

    def search(self, query_GND: Tensor, k: int) -> Found:
        """See ``Search``."""
        query_GND = normalized(query_GND.float().nan_to_num(0.0)).contiguous()
        heads, count, k = len(self.key_GSD), query_GND.shape[1], min(k, self.key_GSD.shape[1])
        ids_GNK = torch.full((heads, count, k), -1, dtype=torch.int64)
        best_GNK = torch.full((heads, count, k), -torch.inf)
        if not k:
            return Found(ids_GNK, best_GNK)
        if count <= _FEW_QUERIES:
            for g in range(heads):
                self.low[g].search(query_GND[g], self.key_GSD[g], self.inverse_GS[g], ids_GNK[g], best_GNK[g])
            return Found(ids_GNK, best_GNK)
        step = max(8, _BLOCK_SCORES // min(self.key_GSD.shape[1], _BLOCK_COLUMNS))
        tasks = [(g, slice(start, start + step)) for g in range(heads) for start in range(0, count, step)]
        for _ in map_in_threads(lambda task: self._block(query_GND, *task, ids_GNK, best_GNK), tasks):
            pass
        return Found(ids_GNK, best_GNK)

    def _block(self, query_GND: Tensor, head: int, rows: slice, ids_GNK: Tensor, best_GNK: Tensor) -> None:
        from fairseq.memory.extended_mind.kernels import best_of_rows

        query_ND, results = query_GND[head, rows], (ids_GNK[head, rows].numpy(), best_GNK[head, rows].numpy())
        if has_fast_int8():
            self.low[head].search_many(query_ND, self.key_GSD[head], self.inverse_GS[head], self._integers, *results)
            return
        for first in range(0, self.key_GSD.shape[1], _BLOCK_COLUMNS):
            columns = slice(first, first + _BLOCK_COLUMNS)
            key_MD = self.key_GSD[head, columns]
            score_NM = self._buffer(len(query_ND), len(key_MD))
            torch.mm(query_ND, key_MD.T, out=score_NM)
            score_NM *= self.inverse_GS[head, columns]
            best_of_rows(score_NM.numpy(), len(key_MD), first, *results)


class _LowKeys:
    """Keys of one head, of length one, in 8 bits: each dimension less its middle, in steps of its own."""

    def __init__(self, key_SD: Tensor, inverse_S: Tensor) -> None:
        from fairseq.memory.extended_mind.kernels import CHUNK

        unit_SD = key_SD * inverse_S[:, None]
        size, width = unit_SD.shape
        rows, columns = -(-size // CHUNK) * CHUNK, -(-width // 8) * 8
        self.low_SD = torch.zeros(rows, columns, dtype=torch.int8)
        self.step_D = torch.zeros(columns)
        self.error = self.longest = 0.0
        if size:
            middle_D = 0.5 * (unit_SD.amax(0) + unit_SD.amin(0))
            self.step_D[:width] = ((unit_SD - middle_D).abs().amax(0) / _LEVELS).clamp_(min=1e-30)
            rounded_SD = ((unit_SD - middle_D) / self.step_D[:width]).round_()
            self.low_SD[:size, :width] = rounded_SD
            left_SD = unit_SD - middle_D - rounded_SD * self.step_D[:width]
            self.error = float(torch.linalg.vector_norm(left_SD, dim=1).amax())
            self.longest = float(torch.linalg.vector_norm(rounded_SD, dim=1).amax())
        self.chunks = self.low_SD.view(-1, CHUNK, columns).transpose(1, 2).contiguous().numpy()

    def search(self, query_ND: Tensor, key_SD: Tensor, inverse_S: Tensor, ids_NK: Tensor, best_NK: Tensor) -> None:
        """Write the nearest memories of few queries of length one."""
        from fairseq.memory.extended_mind.kernels import best_of_low

        weight_ND, margin_N = self._weights(query_ND)
        arrays = (x.numpy() for x in (query_ND, weight_ND, margin_N))
        best_of_low(*arrays, self.chunks, *(x.numpy() for x in (key_SD, inverse_S, ids_NK, best_NK)))  # type: ignore[call-arg]

    def search_many(
        self, query_ND: Tensor, key_SD: Tensor, inverse_S: Tensor, buffer: ThreadBuffer, ids_NK: Array, best_NK: Array
    ) -> None:
        """Write the nearest memories of many queries of length one."""
        from fairseq.memory.extended_mind.kernels import LOWEST, best_of_low_rows

        weight_ND, margin_N = self._weights(query_ND)
        step_N1 = (weight_ND.abs().amax(1, keepdim=True) / _LEVELS).clamp_(min=1e-30)
        rounded_ND = (weight_ND / step_N1).round_()
        # Rounding a query moves a product by at most the product of what is left and the longest key.
        left_N = torch.linalg.vector_norm(weight_ND - rounded_ND * step_N1, dim=1) * self.longest
        reach_N = (2 * (margin_N + left_N) / step_N1[:, 0]).ceil_().clamp_(max=-LOWEST - 1).int()
        low_ND = rounded_ND.to(torch.int8)
        raw_NK = torch.full(best_NK.shape, LOWEST, dtype=torch.int32).numpy()
        queries = (reach_N.numpy(), query_ND.numpy())
        for first in range(0, len(key_SD), _BLOCK_COLUMNS):
            columns = slice(first, first + _BLOCK_COLUMNS)
            low_MD, key_MD = self.low_SD[columns], key_SD[columns]
            raw_NM = buffer(len(low_ND), len(low_MD))
            torch._int_mm(low_ND, low_MD.T, out=raw_NM)
            keys = (key_MD.numpy(), inverse_S[columns].numpy())
            best_of_low_rows(raw_NM.numpy(), len(key_MD), first, *queries, *keys, raw_NK, ids_NK, best_NK)

    def _weights(self, query_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What rounded keys are multiplied with, and how far such a product may be off, up to a constant."""
        weight_ND = torch.zeros(len(query_ND), len(self.step_D))
        torch.mul(query_ND, self.step_D[: query_ND.shape[1]], out=weight_ND[:, : query_ND.shape[1]])
        # By the lengths' product, or half a step in each dimension; and by the rounding of sums.
        return weight_ND, (weight_ND.abs().sum(1) * 0.5).clamp_(max=self.error) + 1e-6


class _PerHead:
    """One index per head; queries and results go through the CPU."""

    def __init__(self, search: list[Callable[[Tensor, int], Neighbors]], size: int) -> None:
        self._search, self._size = search, size

    def search(self, query_GND: Tensor, k: int) -> Found:
        """See ``Search``."""
        query_GND, k = query_GND.detach().float().cpu().nan_to_num(0.0).contiguous(), min(k, self._size)
        if not k:
            empty = query_GND.new_empty((*query_GND.shape[:2], 0))
            return Found(empty.long(), empty)
        found = [search(query_ND, k) for search, query_ND in zip(self._search, query_GND)]
        return Found(torch.stack([f.ids_NK for f in found]), torch.stack([f.scores_NK for f in found]))


def _numbers(key_SD: Tensor) -> Tensor:
    return key_SD if key_SD.dtype in (torch.float32, torch.float16) else key_SD.float()


def exact_search(key_GSD: Tensor, settings: MindSettings) -> Search:
    """The streaming exact search over the keys where they are, in memory or in a mapped file; nothing is built."""
    from fairseq.memory.index.exact import ExactIndex

    indexes = [ExactIndex(_numbers(key_SD.cpu()).numpy(), Metric.COS) for key_SD in key_GSD]
    return _PerHead([index.search for index in indexes], key_GSD.shape[1])


def faiss_search(key_GSD: Tensor, settings: MindSettings) -> Search:
    """A faiss index over each head's keys."""
    from fairseq.memory.index.faiss_index import FaissBuilder

    indexes = []
    for key_SD in key_GSD:
        keys = key_SD.float().cpu().numpy()
        builder = FaissBuilder.new(settings.faiss_index, keys.shape[1], Metric.COS, seed=1)
        builder.train(keys)
        builder.add_codes(builder.encode(keys))
        indexes.append(builder.index(Metric.COS, "the memories' index"))
        indexes[-1].set_probe(settings.faiss_probe)
    return _PerHead([index.search for index in indexes], key_GSD.shape[1])


def manual_search(key_GSD: Tensor, settings: MindSettings) -> Search:
    """Our own search over memories in memory."""
    return KernelSearch(key_GSD) if key_GSD.device.type == "cpu" else PlainSearch(key_GSD)


SEARCHES: Mapping[str, Callable[[Tensor, MindSettings], Search]] = {
    "manual": manual_search,
    "exact": exact_search,
    "faiss": faiss_search,
}

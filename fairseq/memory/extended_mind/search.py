"""Search for the k memories nearest to a query, per head, by cosine similarity.

Every way gives the same memories, up to the rounding of sums; of equally near ones the earlier (a faiss index
excepted). Queries that are zero are near to nothing in particular.

Shapes: G key-value heads, N queries of each, S memories, K chosen, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.extended_mind.settings import MindSettings
from fairseq.memory.index.ops.products import has_fast_library_int8
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.threads import ThreadBuffer, run_in_threads

_FEW_SCORES = 1 << 20
_BLOCK_SCORES = 256 << 10  # 1 MB, which stays in a core's cache
_BLOCK_COLUMNS = 4096
_GPU_SCORES = 64 << 20
_SCORES_OF_A_START = 12 << 20  # as much work as it takes to get threads going, measured with 2 of them
_LEVELS = 127
_SHORTEST = 1e-12  # as torch.nn.functional.normalize has it


def are_worth_threads(starts: float) -> bool:
    """True if work should be shared out; ``starts`` is its time on one thread in units of starting threads."""
    return starts * (1 - 1 / torch.get_num_threads()) > 1


_RowSearch = Callable[[int, slice, Array, Array], None]
"""Writes numbers and similarities of the memories nearest to some queries of a head."""


@dataclass(frozen=True)
class NearestMemories:
    """The memories nearest to each query, best first."""

    ids_GNK: Tensor
    """int64 number of the memory; -1 where there are fewer than K."""
    similarity_GNK: Tensor
    """float32 cosine similarity; -inf where the id is -1."""

    def to(self, device: torch.device) -> NearestMemories:
        """The same on another device."""
        return NearestMemories(self.ids_GNK.to(device), self.similarity_GNK.to(device))


class Search(Protocol):
    """A way to search the keys of one layer."""

    def search(self, query_GND: Tensor, k: int) -> NearestMemories:
        """The ``min(k, S)`` nearest memories of each query; queries may have any length and are on the keys' device."""
        ...


class PlainSearch:
    """Products and ``topk`` of torch, on any device."""

    def __init__(self, key_GSD: Tensor) -> None:
        """Scale keys to length one once."""
        self.unit_GSD = normalized(key_GSD.float())

    def search(self, query_GND: Tensor, k: int) -> NearestMemories:
        """See ``Search``."""
        query_GND = normalized(query_GND.float())
        size = self.unit_GSD.shape[1]
        step = max(1, _GPU_SCORES // max(1, size * len(query_GND)))
        parts = [
            torch.topk(torch.bmm(part_GND, self.unit_GSD.mT), min(k, size), dim=-1)
            for part_GND in torch.split(query_GND, step, dim=1)
        ]
        return NearestMemories(torch.cat([p.indices for p in parts], 1), torch.cat([p.values for p in parts], 1))


_few_products = ThreadBuffer(_FEW_SCORES, torch.int32)
"""Shared by all layers, so that it stays in the core's cache."""


class KernelSearch:
    """Compiled search on a CPU: products in 8 bits where these are fast, then in float32 for those that may matter."""

    def __init__(self, key_GSD: Tensor) -> None:
        """Round the keys. Takes a quarter of their size in float32, besides a copy if they are of another type."""
        self.key_GSD = key_GSD.float().contiguous()
        self.inverse_GS = 1.0 / torch.linalg.vector_norm(self.key_GSD, dim=-1).clamp_(min=_SHORTEST)
        self._quantized = QuantizedKeys(self.key_GSD, self.inverse_GS) if has_fast_library_int8() else None
        dtype = torch.float32 if self._quantized is None else torch.int32
        self._buffer = ThreadBuffer(_BLOCK_SCORES, dtype)

    def search(self, query_GND: Tensor, k: int) -> NearestMemories:
        """See ``Search``."""
        query_GND = query_GND.float().nan_to_num(0.0).contiguous()
        heads, count, k = len(self.key_GSD), query_GND.shape[1], min(k, self.key_GSD.shape[1])
        ids_GNK = torch.full((heads, count, k), -1, dtype=torch.int64)
        best_GNK = torch.full((heads, count, k), -torch.inf)
        if not k:
            return NearestMemories(ids_GNK, best_GNK)
        if self.takes_at_once(count):
            self._at_once(query_GND, ids_GNK, best_GNK)
            return NearestMemories(ids_GNK, best_GNK)
        search_rows = (
            self._plainly(query_GND) if self._quantized is None else self._by_quantized(self._quantized, query_GND)
        )
        step = max(8, _BLOCK_SCORES // min(self.key_GSD.shape[1], _BLOCK_COLUMNS))
        tasks = [(g, slice(start, start + step)) for g in range(heads) for start in range(0, count, step)]

        def run(task: tuple[int, slice]) -> None:
            search_rows(*task, ids_GNK[task].numpy(), best_GNK[task].numpy())

        if are_worth_threads(heads * count * self.key_GSD.shape[1] / _SCORES_OF_A_START):
            run_in_threads(run, tasks)
        else:
            for task in tasks:  # its products are on torch's own threads
                run(task)
        return NearestMemories(ids_GNK, best_GNK)

    def takes_at_once(self, count: int) -> bool:
        """True if so many queries of each head are few: calls and threads would cost more than the work."""
        heads, size = self.key_GSD.shape[:2]
        return self._quantized is not None and 0 < heads * count * size <= _FEW_SCORES

    def quantized_products(self, query_GND: Tensor) -> tuple[Array, Array, Array]:
        """Products of few finite queries with all keys in 8 bits, until the thread asks again.

        Returns: the products, int32 (G, N, S); how far they may be off (G, N); and the queries, of length one.
        """
        assert self._quantized is not None
        unit_GND, quantized_GND, reach_GN = self._quantized.queries(query_GND)
        heads, count = quantized_GND.shape[:2]
        raw_GNS = _few_products(heads * count, self.key_GSD.shape[1]).view(heads, count, -1)
        for raw_NS, quantized_ND, quantized_DS in zip(
            raw_GNS.unbind(), quantized_GND.unbind(), self._quantized.columns
        ):
            torch._int_mm(quantized_ND, quantized_DS, out=raw_NS)
        return raw_GNS.numpy(), reach_GN, unit_GND

    def _at_once(self, query_GND: Tensor, ids_GNK: Tensor, best_GNK: Tensor) -> None:
        """All heads on one thread."""
        from fairseq.memory.extended_mind.kernels import best_of_quantized_heads

        raw_GNS, reach_GN, unit_GND = self.quantized_products(query_GND)
        arrays = (x.numpy() for x in (self.key_GSD, self.inverse_GS, ids_GNK, best_GNK))
        best_of_quantized_heads(raw_GNS, reach_GN, unit_GND, *arrays)

    def _plainly(self, query_GND: Tensor) -> _RowSearch:
        from fairseq.memory.extended_mind.kernels import best_of_rows

        unit_GND = normalized(query_GND)

        def search_rows(head: int, rows: slice, ids_NK: Array, best_NK: Array) -> None:
            for columns in self._columns(len(ids_NK)):
                key_MD = self.key_GSD[head, columns]
                score_NM = self._buffer(len(ids_NK), len(key_MD))
                torch.mm(unit_GND[head, rows], key_MD.T, out=score_NM)
                score_NM *= self.inverse_GS[head, columns]
                best_of_rows(score_NM.numpy(), len(key_MD), columns.start, ids_NK, best_NK)

        return search_rows

    def _by_quantized(self, keys: QuantizedKeys, query_GND: Tensor) -> _RowSearch:
        from fairseq.memory.extended_mind.kernels import LOWEST, BestOfRows, best_of_quantized_rows

        units, quantized_GND, reaches = keys.queries(query_GND)
        key_GSD, inverse_GS = self.key_GSD.numpy(), self.inverse_GS.numpy()

        def search_rows(head: int, rows: slice, ids_NK: Array, best_NK: Array) -> None:
            best = tuple(BestOfRows(np.full(ids_NK.shape, LOWEST, np.int32), ids_NK, best_NK))
            reach_N, query_ND = reaches[head, rows], units[head, rows]
            for columns in self._columns(len(ids_NK)):
                quantized_MD, key_MD = keys.quantized_GSD[head, columns], key_GSD[head, columns]
                raw_NM = self._buffer(len(ids_NK), len(quantized_MD))
                torch._int_mm(quantized_GND[head, rows], quantized_MD.T, out=raw_NM)
                raw, inverse_M = raw_NM.numpy(), inverse_GS[head, columns]
                best_of_quantized_rows(raw, len(key_MD), columns.start, reach_N, query_ND, key_MD, inverse_M, best)

        return search_rows

    def _columns(self, rows: int) -> list[slice]:
        width = max(_BLOCK_COLUMNS, _BLOCK_SCORES // max(1, rows))
        return [slice(at, at + width) for at in range(0, self.key_GSD.shape[1], width)]


class QuantizedKeys:
    """Keys of length one in 8 bits: each dimension less its middle, in steps of its own.

    What a middle adds to a product is the same for all keys.
    """

    def __init__(self, key_GSD: Tensor, inverse_GS: Tensor) -> None:
        """Round keys, given what makes their lengths one."""
        heads, size, width = key_GSD.shape
        columns = -(-width // 8) * 8
        self.quantized_GSD = torch.zeros(heads, size, columns, dtype=torch.int8)
        self.step_GD = torch.zeros(heads, columns)
        self.error_G, self.longest_G = torch.zeros(heads), torch.zeros(heads)
        for g in range(heads if size else 0):
            unit_SD = key_GSD[g] * inverse_GS[g, :, None]
            unit_SD -= 0.5 * (unit_SD.amax(0) + unit_SD.amin(0))
            step_D = (unit_SD.abs().amax(0) / _LEVELS).clamp_(min=1e-30)
            rounded_SD = (unit_SD / step_D).round_()
            self.quantized_GSD[g, :, :width], self.step_GD[g, :width] = rounded_SD, step_D
            self.longest_G[g] = torch.linalg.vector_norm(rounded_SD, dim=1).amax()
            self.error_G[g] = torch.linalg.vector_norm(unit_SD.sub_(rounded_SD.mul_(step_D)), dim=1).amax()

        self.columns = self.quantized_GSD.mT.unbind()
        """(D, S) of each head."""
        self._rounding = [x.numpy() for x in (self.step_GD, self.error_G, self.longest_G)]

    def queries(self, query_GND: Tensor) -> tuple[Array, Tensor, Array]:
        """Queries of length one, in 8 bits, and how far products may be off (see ``round_queries``)."""
        from fairseq.memory.extended_mind.kernels import round_queries

        heads, count, width = query_GND.shape
        unit_GND = np.empty((heads, count, width), np.float32)
        columns = self.step_GD.shape[1]
        quantized_GND = (torch.empty if columns == width else torch.zeros)(heads, count, columns, dtype=torch.int8)
        reach_GN = np.empty((heads, count), np.int32)
        round_queries(query_GND.numpy(), *self._rounding, unit_GND, quantized_GND.numpy(), reach_GN)  # type: ignore[call-arg]
        return unit_GND, quantized_GND, reach_GN


class _PerHead:
    """One index per head; queries and results go through the CPU."""

    def __init__(self, search: list[Callable[[Tensor, int], Neighbors]], size: int) -> None:
        self._search, self._size = search, size

    def search(self, query_GND: Tensor, k: int) -> NearestMemories:
        """See ``Search``."""
        query_GND, k = query_GND.detach().float().cpu().nan_to_num(0.0).contiguous(), min(k, self._size)
        if not k:
            empty = query_GND.new_empty((*query_GND.shape[:2], 0))
            return NearestMemories(empty.long(), empty)
        neighbors = [search(query_ND, k) for search, query_ND in zip(self._search, query_GND)]
        return NearestMemories(
            torch.stack([f.ids_NK for f in neighbors]), torch.stack([f.scores_NK for f in neighbors])
        )


def _numbers(key_SD: Tensor) -> Tensor:
    return key_SD if key_SD.dtype in (torch.float32, torch.float16) else key_SD.float()


def exact_search(key_GSD: Tensor, settings: MindSettings) -> Search:
    """The streaming exact search over the keys where they are, in memory or in a mapped file; nothing is built."""
    from fairseq.memory.index.exact.index import ExactIndex

    indexes = [ExactIndex(_numbers(key_SD.cpu()).numpy(), Metric.COS) for key_SD in key_GSD]
    return _PerHead([index.search for index in indexes], key_GSD.shape[1])


def faiss_search(key_GSD: Tensor, settings: MindSettings) -> Search:
    """A faiss index over each head's keys."""
    from fairseq.memory.index.faiss.builder import FaissBuilder

    indexes = []
    for key_SD in key_GSD:
        keys = key_SD.float().cpu().numpy()
        builder = FaissBuilder.new(settings.faiss_index, keys.shape[1], Metric.COS, seed=1)
        builder.train(keys)
        builder.add(keys)
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

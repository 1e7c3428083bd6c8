"""Searches a faiss index on GPUs, where the faiss at hand can (faiss-gpu).

The rows are dealt out to parts: as many as the GPUs' memory asks for, and so many that no part is asked for more
neighbours than the library returns rightly. Parts that do not fit at the same time take turns for each bulk of queries.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, search_faiss
from fairseq.memory.index.ops.merging import merged
from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

MOST_NEIGHBORS = 2048
"""faiss on a GPU returns no more per query."""
_MEMORY_SHARE = 0.7
_SCRATCH_BYTES = 2 << 30
_KINDS = {"IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer"}


class GpuSearch:
    """An index dealt out to GPUs."""

    def __init__(self, index: SwigIndex, devices: Sequence[int], part_bytes: int) -> None:
        """Args.

        index: of one of the kinds GPUs can search.
        part_bytes: memory a part may take.
        """
        self._index, self._devices, self._part_bytes = index, list(devices), part_bytes
        self._num_parts = 0
        self._resident: dict[int, Any] = {}
        self._resources: list[Any] = []

    @classmethod
    def of(cls, index: SwigIndex, name: str) -> GpuSearch | None:
        """A search on the available GPUs; None, after one line that says why, where the CPU searches."""
        faiss = faiss_library()
        count = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
        kind = type(index).__name__
        why = None
        if not count:
            why = "this faiss knows no GPU (faiss-gpu does)" if torch.cuda.is_available() else "there is no GPU"
        elif kind not in _KINDS:
            why = f"faiss has no {kind} for GPUs"
        if why is not None:
            logger.info("%s is searched on the CPU: %s", name, why)
            return None
        free = min(torch.cuda.mem_get_info(device)[0] for device in range(count))
        return cls(index, range(count), max(1 << 28, int(_MEMORY_SHARE * free) - _SCRATCH_BYTES))

    def search(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and ids (N, k), and the queries whose result is in doubt, which the CPU should search again."""
        index = self._index
        is_l2 = index.metric_type == faiss_library().METRIC_L2
        row_bytes = index.sa_code_size() + 16
        fits = -(-index.ntotal * row_bytes // self._part_bytes)
        # Twice as many as the neighbours ask for: rows are dealt out evenly, and a part holds half of what it may
        # return.
        needed = max(1, fits, -(-2 * k // MOST_NEIGHBORS) if k > MOST_NEIGHBORS else 1)
        if needed != self._num_parts:
            self._num_parts, self._resident = needed, {}
        results, sizes = [], []
        query = np.ascontiguousarray(query_ND.numpy())
        for number in range(needed):
            part = self._part(number, keep=fits <= len(self._devices))
            sizes.append(int(part.ntotal))
            if hasattr(part, "nprobe"):
                part.nprobe = index.nprobe  # it may have been set since the part was made
            distances_NL, ids_NL = search_faiss(part, query, min(k, MOST_NEIGHBORS, max(1, sizes[-1])))
            scores_NL = torch.from_numpy(distances_NL)
            ids = torch.from_numpy(self._renumbered(ids_NL, number))
            results.append((ids, scores_NL.neg() if is_l2 else scores_NL))
        ids_NK, scores_NK, doubt_N = merged(results, sizes, k)
        return scores_NK, ids_NK, doubt_N

    def _renumbered(self, ids_NL: Array, number: int) -> Array:
        """Rows of the whole index; those of a part of an index without lists are numbered from 0."""
        if faiss_library().try_extract_index_ivf(self._index) is not None:
            return ids_NL
        return np.where(ids_NL < 0, -1, ids_NL * self._num_parts + number)

    def _part(self, number: int, *, keep: bool) -> Any:
        """One part on its GPU."""
        if number in self._resident:
            return self._resident[number]
        self._resident = self._resident if keep else {}
        made = self._on_gpu(self._cut(number), self._devices[number % len(self._devices)])
        self._resident[number] = made
        return made

    def _cut(self, number: int) -> Any:
        """Every so-many-th row, from one on."""
        faiss = faiss_library()
        if self._num_parts == 1:
            return self._index
        if faiss.try_extract_index_ivf(self._index) is None:
            kind: Any = type(self._index)
            part = kind(self._index.d)
            keys = self._index.reconstruct_n(0, self._index.ntotal)[number :: self._num_parts]
            part.metric_type = self._index.metric_type
            part.add(np.ascontiguousarray(keys))
            return part
        part = faiss.clone_index(self._index)
        part.reset()
        self._index.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, self._num_parts, number)
        return part

    def _on_gpu(self, part: SwigIndex, device: int) -> Any:
        faiss = faiss_library()
        if not self._resources:
            self._resources = [faiss.StandardGpuResources() for _ in self._devices]
        options = faiss.GpuClonerOptions()
        # The tables of compressed keys: in float32 those of long codes do not fit. Full keys stay what they are.
        options.useFloat16 = type(part).__name__ == "IndexIVFPQ"
        return faiss.index_cpu_to_gpu(self._resources[self._devices.index(device)], device, part, options)

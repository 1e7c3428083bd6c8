"""The lists of a faiss index of product-quantized keys, decoded for searches in bulk (``search.py``)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, search_faiss
from fairseq.memory.index.lists.search import PreparedList, Rotation
from fairseq.memory.index.ops.products import Products, by_name
from fairseq.memory.types import Array

_CACHE_BYTES = 2 << 30  # lists are kept decoded up to this size, so that the next bulk finds them ready
_SAMPLE_ROWS = 16_384
_DROPPED_SHARE = 0.01  # see Rotation.fit; keys of a list are alike: with 0.03 five times as many are scored


class DecodedLists:
    """The lists of an index of product-quantized keys, decoded on demand (see ``lists.search``)."""

    ties_by_id = False

    def __init__(self, index: SwigIndex, *, products: Products, deleted: Array | None = None) -> None:
        """Take a faiss IndexIVFPQ.

        Args:
            products: what columns are multiplied by; float32 unless these are rounded.
            deleted: rows that must not be found, in rising order.
        """
        faiss = faiss_library()
        self._index, self.by_distance = index, index.metric_type == faiss.METRIC_L2
        self._deleted = np.empty(0, np.int64) if deleted is None else deleted
        self.products = products if products.is_rounded else by_name("float32")
        self._centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))
        pq = index.pq
        self._codewords = torch.from_numpy(faiss.vector_to_array(pq.centroids)).view(pq.M * pq.ksub, pq.dsub)
        self._first_of_part = torch.arange(pq.M, dtype=torch.int32) * pq.ksub
        self.room: object = None
        """Memory that a search keeps for the next one."""
        self._cache: dict[int, PreparedList] | None = {} if 5 * index.ntotal * (index.d + 4) <= _CACHE_BYTES else None
        self.key_size = float(self._centroids.square().sum(1).amax())
        self._rotation = Rotation.fit(self._sample(), _DROPPED_SHARE)

    def __len__(self) -> int:
        return int(self._index.nlist)

    def probed_lists(self, query_ND: Tensor) -> Tensor:
        """See ``Lists``."""
        return torch.from_numpy(search_faiss(self._index.quantizer, query_ND.numpy(), self._index.nprobe)[1])

    def rotated(self, query_ND: Tensor) -> Tensor:
        """See ``Lists``."""
        return self._rotation(query_ND)

    def prepare(self, number: int) -> PreparedList:
        """See ``Lists``."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        ids_M = self.ids(number)
        dead_M = np.flatnonzero(np.isin(ids_M, self._deleted)) if len(self._deleted) else None
        keys = PreparedList.of(
            ids_M,
            self._decoded(number),
            self._centroids[number],
            self._rotation,
            by_distance=self.by_distance,
            products=self.products,
            dead_M=dead_M,
        )
        if self._cache is not None:
            self._cache[number] = keys
        return keys

    def keys(self, number: int) -> tuple[Array, Array]:
        """Ids and float32 keys of one list, without what bounds their scores."""
        if self._cache is not None and number in self._cache:
            return self._cache[number].ids_M, self._cache[number].keys_MD
        return self.ids(number), self._decoded(number).numpy()

    def use_one_thread(self) -> None:
        """Keep faiss to the calling thread, in that thread only."""
        faiss_library().omp_set_num_threads(1)

    def size(self, number: int) -> int:
        """Keys of one list."""
        return int(self._index.invlists.list_size(number))

    def ids(self, number: int) -> Array:
        """Rows of the store in one list."""
        lists = self._index.invlists
        size = lists.list_size(number)
        rows = faiss_library().rev_swig_ptr(lists.get_ids(number), size) if size else np.empty(0, np.int64)
        return np.array(rows, np.int64)

    def _decoded(self, number: int) -> Tensor:
        """Keys of one list, float32 (M, D)."""
        lists = self._index.invlists
        size = lists.list_size(number)
        if not size:
            return torch.empty(0, self._index.d)
        codes = torch.from_numpy(faiss_library().rev_swig_ptr(lists.get_codes(number), size * lists.code_size))
        places = codes.view(size, -1).to(torch.int32) + self._first_of_part
        keys_MD = self._codewords.index_select(0, places.view(-1)).view(size, self._index.d)
        return keys_MD + self._centroids[number] if self._index.by_residual else keys_MD

    def _sample(self) -> Tensor:
        """Some keys less the centroids of their lists."""
        numbers = torch.randperm(self._index.nlist, generator=torch.Generator().manual_seed(0)).tolist()
        parts, count = [], 0
        for number in numbers:
            part_MD = self._decoded(number)[: _SAMPLE_ROWS // 16] - self._centroids[number]
            parts.append(part_MD)
            count += len(part_MD)
            if count >= _SAMPLE_ROWS:
                break
        return torch.cat(parts) if parts else torch.empty(0, self._index.d)

"""The lists of a faiss index of product-quantized keys, decoded for searches in bulk (``bulk_search.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.files import Array
from fairseq.memory.index.faiss_library import faiss_library
from fairseq.memory.index.low_precision import Int8Keys, Int8Queries

_MIN_QUERIES_PER_LIST = 16  # decoding a key costs about as much as ten of its distances
_CACHE_BYTES = 2 << 30  # lists are kept decoded up to this size, so that the next bulk finds them ready


class DecodedLists:
    """The lists of an index of product-quantized keys, decoded on demand (see ``bulk_search``)."""

    def __init__(self, index: Any) -> None:
        """Take a faiss IndexIVFPQ."""
        faiss = faiss_library()
        self._index, self._is_l2 = index, index.metric_type == faiss.METRIC_L2
        self._centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))
        pq = index.pq
        self._codewords = torch.from_numpy(faiss.vector_to_array(pq.centroids)).view(pq.M * pq.ksub, pq.dsub)
        self._first_of_part = torch.arange(pq.M, dtype=torch.int32) * pq.ksub
        self._cache: dict[int, Tensor] | None = {} if 4 * index.ntotal * (index.d + 1) <= _CACHE_BYTES else None
        self._low_cache: dict[tuple[int, float], Int8Keys] = {}
        self.key_size = float(self._centroids.square().sum(1).amax())

    @staticmethod
    def pays_for(index: Any, num_queries: int) -> bool:
        """Whether decoding lists for so many queries costs less than faiss's own search."""
        is_ivfpq = type(index).__name__ == "IndexIVFPQ" and index.pq.nbits == 8 and index.nlist > 0
        return is_ivfpq and num_queries * index.nprobe >= _MIN_QUERIES_PER_LIST * index.nlist

    def visited(self, query_ND: Tensor) -> Tensor:
        """The lists each query visits, nearest first."""
        return torch.from_numpy(self._index.quantizer.search(query_ND.numpy(), self._index.nprobe)[1])

    def ids(self, number: int) -> Tensor:
        """Rows of the store in one list."""
        lists = self._index.invlists
        size = lists.list_size(number)
        if not size:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(faiss_library().rev_swig_ptr(lists.get_ids(number), size))

    def decoded(self, number: int) -> Tensor:
        """Keys of one list, for L2 with minus half their squared length behind them."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        lists, width = self._index.invlists, self._index.d
        size = lists.list_size(number)
        codes = torch.from_numpy(faiss_library().rev_swig_ptr(lists.get_codes(number), size * lists.code_size))
        chosen = codes.view(size, -1).to(torch.int32) + self._first_of_part
        keys_MD = torch.zeros(size, width + 1)
        keys_MD[:, :width] = self._codewords.index_select(0, chosen.view(-1)).view(size, width)
        if self._index.by_residual:
            keys_MD[:, :width] += self._centroids[number]
        if self._is_l2:
            keys_MD[:, width] = torch.linalg.vector_norm(keys_MD[:, :width], dim=1).square_().mul_(-0.5)
        if self._cache is not None:
            self._cache[number] = keys_MD
        return keys_MD

    def low(self, number: int, queries: Int8Queries) -> Int8Keys:
        """Keys of one list in 8 bits, kept where the decoded ones are."""
        found = self._low_cache.get((number, queries.largest))
        if found is None:
            found = Int8Keys(self.decoded(number), queries)
            if self._cache is not None:
                self._low_cache[number, queries.largest] = found
        return found

    def products(self, query_ND: Tensor, row_H: Tensor, keys_MD: Tensor, col_H: Tensor) -> Tensor:
        """Inner products of pairs of rows."""
        return _pairwise("pairwise_indexed_inner_product", query_ND, row_H, keys_MD, col_H)

    def use_one_thread(self) -> None:
        """Keep faiss to the calling thread, in that thread only."""
        faiss_library().omp_set_num_threads(1)


def _pairwise(function: str, left_ND: Tensor, row_H: Tensor, right_MD: Tensor | Array, col_H: Tensor) -> Tensor:
    """Apply one of faiss's functions of pairs of rows; it reads them in place, where torch would copy them first."""
    faiss = faiss_library()
    out_H = torch.empty(len(row_H))
    right_MD = right_MD.contiguous().numpy() if isinstance(right_MD, Tensor) else np.ascontiguousarray(right_MD)
    arrays = [t.contiguous().numpy() for t in (left_ND, row_H, col_H)]
    left, row, col, right = map(faiss.swig_ptr, (*arrays, right_MD))
    getattr(faiss, function)(left_ND.shape[1], len(row_H), left, row, right, col, faiss.swig_ptr(out_H.numpy()))
    return out_H

"""The lists of a faiss index, decoded for searches in bulk (``search.py``)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, has_byte_codes, search_faiss
from fairseq.memory.index.lists.residual_kernels import decode_bytes
from fairseq.memory.index.lists.search import PreparedList, Rotation
from fairseq.memory.index.ops.products import Products, by_name
from fairseq.memory.types import Array

KEPT_BYTES = 2 << 30
"""Lists are kept decoded up to this size, so that the next bulk finds them ready."""
_SAMPLE_ROWS = 16_384
_DROPPED_SHARE = 0.01  # see Rotation.fit; keys of a list are alike: with 0.03 five times as many are scored


class DecodedLists:
    """The lists of an index whose keys are product-quantized, a byte a column, or whole, decoded on demand (see
    ``lists.search``).

    Decoded lists of product-quantized keys are kept, and are several times as large as the index. Of the other kinds
    nothing is kept, which would take a quarter more memory than whole keys and six times that of bytes.
    """

    def __init__(
        self, index: SwigIndex, *, products: Products, deleted: Array | None = None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Take a faiss index of a kind that has ``faiss_library.bulk_queries_per_list``.

        Args:
            products: what columns are multiplied by; float32 unless these are rounded.
            deleted: rows that must not be found, in rising order.
            kept_bytes: limit on decoded lists of product-quantized keys; if all are larger, none is kept.
        """
        faiss = faiss_library()
        self._index, self.by_distance = index, index.metric_type == faiss.METRIC_L2
        self._deleted = np.empty(0, np.int64) if deleted is None else deleted
        self.products = products if products.is_rounded else by_name("float32")
        self._centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))
        self._decode = _decoder(index, self._centroids)
        self.room: object = None
        """Memory that a search keeps for the next one."""
        is_kept = has_byte_codes(index) and 5 * index.ntotal * (index.d + 4) <= kept_bytes
        self._cache: dict[int, PreparedList] | None = {} if is_kept else None
        self.key_size = float(self._centroids.square().sum(1).amax())
        # To rotate a key for each bulk would take as long as hundreds of its products.
        self._rotation = Rotation.fit(self._sample(), _DROPPED_SHARE) if is_kept else Rotation(None, index.d)

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
        return self._decode(codes.view(size, -1), number)

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


def _decoder(index: SwigIndex, centroid_LD: Tensor) -> Callable[[Tensor, int], Tensor]:
    """What turns the codes of a list, uint8 (M, S), and its number into float32 keys (M, D)."""
    faiss = faiss_library()
    offset_LD = centroid_LD if index.by_residual else torch.zeros_like(centroid_LD)
    if has_byte_codes(index):
        pq = index.pq
        codewords = torch.from_numpy(faiss.vector_to_array(pq.centroids)).view(pq.M * pq.ksub, pq.dsub)
        first_of_part = torch.arange(pq.M, dtype=torch.int32) * pq.ksub

        def decode_words(codes_MS: Tensor, number: int) -> Tensor:
            places_MS = codes_MS.to(torch.int32) + first_of_part
            keys_MD = codewords.index_select(0, places_MS.view(-1)).view(len(codes_MS), index.d)
            return keys_MD + offset_LD[number] if index.by_residual else keys_MD

        return decode_words
    if type(index).__name__ == "IndexIVFFlat":
        return lambda codes_MS, number: codes_MS.view(torch.float32)
    # A column's bytes divide the range that training has seen, and stand for the middles of their parts.
    least_D, range_D = faiss.vector_to_array(index.sq.trained).reshape(2, index.d)
    step_D = range_D / np.float32(255)

    def decode(codes_MS: Tensor, number: int) -> Tensor:
        keys_MD = torch.empty(codes_MS.shape)
        own = (least_D + np.float32(0.5) * step_D, step_D, offset_LD[number].numpy())
        decode_bytes(codes_MS.numpy(), *own, keys_MD.numpy())
        return keys_MD

    return decode

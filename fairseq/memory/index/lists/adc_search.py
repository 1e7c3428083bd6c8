"""Searches an index of product-quantized keys for many neighbours of few queries, as generation does.

A score is a sum of entries of a table: products of the query with the codewords, computed once for all lists; what
depends on the key alone is kept with it, and the centroid of a list adds the same to all its keys. Where a processor
looks up 64 bytes at once, sums of entries that are rounded to bytes bound all scores first, of codes that are laid out
for that; the scores have the same bits. Tables of each list, as faiss makes them, take as long to make as to read; for
a bulk matrix products are faster (``bulk_search``).

Shapes: N queries, P lists a query probes, L lists, S groups of scores, K neighbours, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, faiss_threads, search_faiss
from fairseq.memory.index.lists.decoded_lists import KEPT_BYTES
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.types import Array
from fairseq.runtime import hardware
from fairseq.runtime.threads import ObjectPool, run_in_threads

if TYPE_CHECKING:
    from fairseq.memory.index.lists.adc_kernels import TableRoom
    from fairseq.memory.index.lists.byte_search_kernels import ByteCodes
    from fairseq.memory.index.lists.large_k_kernels import SelectionRoom
    from fairseq.memory.index.lists.single_search_kernels import SingleRoom

MOST_PARTS = 256
"""Sums of so many bytes fit 16 bits."""
_ROWS_PER_TASK = 32_768
"""Probed keys of a task at least, some milliseconds of work: to start another thread takes a few tenths of one."""


_NO_CODES = (
    np.empty(0, np.uint8), np.zeros(1, np.int64), np.zeros(1, np.float32)
)  # fmt: skip


@functools.cache
def byte_sums() -> str:
    """The instruction set that looks up bytes here; an empty string for none."""
    from fairseq.memory.index.ops.numba_library import compiler_features

    has_shuffles = "avx512vbmi" in hardware.cpu_features() and "avx512vbmi" in compiler_features()
    return "avx512_vbmi" if has_shuffles else ""


def codewords(index: SwigIndex) -> Array:
    """Codewords of an index of product-quantized keys, float32 (parts, numbers of a codeword, codewords)."""
    pq = index.pq
    words = faiss_library().vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    return np.ascontiguousarray(words.transpose(0, 2, 1))


def residual_centroids(index: SwigIndex) -> Array:
    """The vectors that were subtracted from the keys of each list before quantization, float32 (L, D)."""
    centroid_LD: Array = index.quantizer.reconstruct_n(0, index.nlist)
    return centroid_LD if index.by_residual else np.zeros_like(centroid_LD)


@dataclass
class SearchRoom:
    """Memory for any query, and for the neighbours of one."""

    table: TableRoom
    byte_2MJ: Array
    selection: SelectionRoom
    single: SingleRoom
    for_one: tuple[Any, ...] = ()
    """See :meth:`arguments`: to make it anew takes as long as a tenth of a search."""
    mass_V: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    def arguments(self, search: AdcSearch, k: int) -> tuple[Any, ...]:
        """What the kernels of ``single_search_kernels`` take after a query that wants ``k`` neighbours."""
        if self.single.ids_1K.shape[1] != k:
            ids_1K, scores_1K = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
            self.single = self.single._replace(ids_1K=ids_1K, scores_1K=scores_1K)
            self.for_one = (
                *search.arguments, tuple(self.table), self.byte_2MJ, tuple(self.selection), tuple(self.single)
            )  # fmt: skip
        return self.for_one

    def zeros(self, vocabulary: int) -> Array:
        """Zeros for each type, float32 (V,); whoever uses them leaves them zero."""
        if len(self.mass_V) != vocabulary:
            self.mass_V = np.zeros(vocabulary, np.float32)
        return self.mass_V


class AdcSearch:
    """The codes of an index where they are, with four bytes for each key beside them.

    With AVX-512 VBMI there is a copy of the codes of lists that were probed, up to 2 GB of them.
    """

    def __init__(self, index: SwigIndex, alive: Array | None = None, kept_bytes: int = KEPT_BYTES) -> None:
        """Look where the codes are.

        Args:
            index: an IndexIVFPQ of 8-bit codes, in memory; once keys are added to it this must not be used any more.
            alive: a bit for each row that may be found, the lowest first; None where all may.
            kept_bytes: limit on the copy of the codes; if all are larger, none is made.
        """
        from fairseq.memory.index.lists.adc_kernels import ListArrays

        faiss, lists = faiss_library(), index.invlists
        self._index, self._by_distance = index, index.metric_type == faiss.METRIC_L2
        self._alive = np.empty(0, np.uint8) if alive is None else alive
        address_L2 = np.zeros((index.nlist, 2), np.int64)
        sizes = np.zeros(index.nlist, np.int64)
        for number in range(index.nlist):
            sizes[number] = size = lists.list_size(number)
            if size:
                arrays = (lists.get_codes(number), size * lists.code_size), (lists.get_ids(number), size)
                address_L2[number] = [faiss.rev_swig_ptr(*each).ctypes.data for each in arrays]
        first_L = np.concatenate([[0], sizes.cumsum()])
        bias = np.empty(first_L[-1], np.float32)
        self._lists = ListArrays(codewords(index), residual_centroids(index), address_L2, first_L, bias)
        quantizer = faiss.downcast_index(index.quantizer)
        self.has_flat_centroids = bool(
            index.by_residual and isinstance(quantizer, faiss.IndexFlat) and quantizer.metric_type == index.metric_type
        )
        """The centroids that keys are less are those that queries are compared with, one by one."""
        self.bytes, self._codes = self._byte_codes(sizes, kept_bytes)
        self._is_ready_L = np.zeros(index.nlist, np.bool_)
        self._most_L = np.sort(-(-sizes // GROUP))[::-1].cumsum()
        self._num_probed = 0
        self._rooms = ObjectPool(self._fresh_room)

    @property
    def num_keys(self) -> int:
        """Keys that were in the lists at the start."""
        return len(self._lists.bias)

    def search(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best keys of the probed lists, best first, of equals the lower row; little work on the calling thread.

        Returns: ids (N, k), -1 where fewer were found, and scores (N, k), higher is closer, minus infinity there.
        """
        query = np.ascontiguousarray(query_ND.numpy())
        probed_NP = self._nearest_lists(query)
        self._prepare(probed_NP)
        self.rooms()
        ids_NK, scores_NK = torch.empty((len(query), k), dtype=torch.int64), torch.empty((len(query), k))
        num_rows = int((self._lists.first_L[1:] - self._lists.first_L[:-1])[probed_NP].sum())
        num_tasks = max(1, min(2 * torch.get_num_threads(), num_rows // _ROWS_PER_TASK))
        step = max(1, -(-len(query) // num_tasks))
        parts = [slice(first, first + step) for first in range(0, len(query), step)]
        outs = (ids_NK.numpy(), scores_NK.numpy())
        run_in_threads(lambda part: self._search(query[part], probed_NP[part], *(x[part] for x in outs)), parts)
        return ids_NK, scores_NK

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take of the lists."""
        codes = _NO_CODES if self._codes is None else tuple(self._codes)
        return tuple(self._lists), codes, self._by_distance, self._is_ready_L

    def rooms(self) -> ObjectPool[SearchRoom]:
        """Memory for searches of as many lists as the index probes now."""
        if self._num_probed != self._index.nprobe:
            self._num_probed = self._index.nprobe
            self._rooms = ObjectPool(self._fresh_room)
        return self._rooms

    def prepare_nearest(self, query_ND: Array) -> None:
        """Prepare the lists that queries probe."""
        self._prepare(self._nearest_lists(query_ND))

    def _nearest_lists(self, query_ND: Array) -> Array:
        if not self.has_flat_centroids:
            with faiss_threads(1):
                return search_faiss(self._index.quantizer, query_ND, self._index.nprobe)[1]
        from fairseq.memory.index.lists.single_search_kernels import nearest_lists

        centroid_LD, probed_NP = self._lists.centroid_LD, np.empty((len(query_ND), self._index.nprobe), np.int64)
        share_L, packed_L = np.empty(len(centroid_LD), np.float32), np.empty(len(centroid_LD) + 1, np.int64)
        nearest_lists(query_ND, centroid_LD, self._by_distance, share_L, packed_L, probed_NP)
        return probed_NP

    def _search(self, query_QD: Array, probed_QP: Array, ids_QK: Array, scores_QK: Array) -> None:
        from fairseq.memory.index.lists.adc_kernels import search_tables
        from fairseq.memory.index.lists.large_k_kernels import unpack
        from fairseq.memory.index.ops.kernels import NOTHING

        count_Q = np.empty(len(query_QD), np.int64)
        lists, wanted = tuple(self._lists), ids_QK.shape[1]
        with self._rooms.borrow() as held:
            packed_QC, byte_2MJ = held.single.packed_1F, held.byte_2MJ
            packed_QC = packed_QC if len(query_QD) == 1 else np.empty((len(query_QD), packed_QC.shape[1]), np.int64)
            room, selection = tuple(held.table), tuple(held.selection)
            outs = (selection, packed_QC, count_Q)
            if self._codes is None:
                search_tables(query_QD, probed_QP, wanted, lists, self._by_distance, room, *outs)
            else:
                from fairseq.memory.index.lists.byte_search_kernels import byte_search

                given = (lists, tuple(self._codes), self._by_distance, room, byte_2MJ)
                byte_search(self.bytes)(query_QD, probed_QP, wanted, *given, *outs)
            best_QC = packed_QC[:, : int(count_Q.max(initial=0))]
            if len(count_Q) > 1:
                best_QC[np.arange(best_QC.shape[1]) >= count_Q[:, None]] = NOTHING
            best_QC.sort(axis=1)
            unpack(best_QC, ids_QK, scores_QK)

    def _prepare(self, probed_NP: Array) -> None:
        """Write the biases of lists that are probed for the first time."""
        if not self._is_ready_L[probed_NP].all():
            from fairseq.memory.index.lists.adc_kernels import prepare_lists

            numbers = np.unique(probed_NP[(probed_NP >= 0) & ~self._is_ready_L[probed_NP]])
            prepare_lists(numbers, tuple(self._lists), self._alive, self._by_distance, self._fresh_table())
            if self._codes is not None:
                self._lay_out(numbers, self._codes)
            self._is_ready_L[numbers] = True

    def _byte_codes(self, sizes: Array, kept_bytes: int) -> tuple[str, ByteCodes | None]:
        """The instruction set that looks up bytes, and room for codes as it wants them; none where there is none."""
        from fairseq.memory.index.lists.byte_search_kernels import ByteCodes

        parts = int(self._index.pq.M)
        num_bytes = -(-sizes // GROUP) * GROUP * parts
        name = byte_sums()
        if not name or parts > MOST_PARTS or int(num_bytes.sum()) > kept_bytes:
            return "", None
        first_L = np.concatenate([[0], num_bytes.cumsum()])
        return name, ByteCodes(np.empty(first_L[-1], np.uint8), first_L, np.zeros(1, np.float32))

    def _lay_out(self, numbers: Array, codes: ByteCodes) -> None:
        """Copy the codes of some lists, and note their largest bias."""
        from fairseq.memory.index.lists.byte_table_kernels import lay_out_codes

        faiss, lists = faiss_library(), self._index.invlists
        for number in numbers.tolist():
            size = lists.list_size(number)
            if size:
                code_SM = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
                lay_out_codes(code_SM, codes.code_B[codes.first_L[number] : codes.first_L[number + 1]])
                bias_S = self._lists.bias[self._lists.first_L[number] : self._lists.first_L[number + 1]]
                largest = np.abs(bias_S[np.isfinite(bias_S)]).max(initial=0.0)
                codes.bias_1[0] = max(codes.bias_1[0], largest)

    def _fresh_room(self) -> SearchRoom:
        from fairseq.memory.index.lists.adc_kernels import TableRoom
        from fairseq.memory.index.lists.large_k_kernels import SelectionRoom
        from fairseq.memory.index.lists.single_search_kernels import SingleRoom

        num_probed, num_lists = self._num_probed, len(self._is_ready_L)
        groups = int(self._most_L[min(num_probed, num_lists) - 1])
        bounds = (groups + 1) * GROUP
        table = TableRoom(
            table_MJ=self._fresh_table(),
            score_SP=np.empty((groups, GROUP), np.float32),
            most_S=np.empty(groups, np.float32),
            edge_1P=np.zeros((1, num_probed + 1), np.int64),
            end_1P=np.zeros((1, num_probed), np.int64),
            place_F=np.empty(bounds, np.int64),
        )
        selection = SelectionRoom(
            place_C=np.empty(bounds, np.int64),
            bound_C=np.empty(bounds, np.float32),
            lower_C=np.empty(bounds, np.float32),
            flag_S=np.empty(groups + 1, np.int64),
        )
        single = SingleRoom(
            share_L=np.empty(num_lists, np.float32),
            packed_L=np.empty(num_lists + 1, np.int64),
            probed_1P=np.empty((1, num_probed), np.int64),
            packed_1F=np.empty((1, bounds), np.int64),
            count_1=np.empty(1, np.int64),
            ids_1K=np.empty((1, 0), np.int64),
            scores_1K=np.empty((1, 0), np.float32),
        )
        return SearchRoom(table, np.empty((2, *table.table_MJ.shape), np.uint8), selection, single)

    def _fresh_table(self) -> Array:
        parts, _, words = self._lists.words_MEJ.shape
        return np.empty((parts, words), np.float32)

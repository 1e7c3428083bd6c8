"""The lists of a faiss index, decoded and rounded for searches in bulk (``bulk_search.py``).

Shapes: M keys of a list, L lists, P places of keys, D width, E columns of the products.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, has_byte_codes, search_faiss
from fairseq.memory.index.kmeans.halving import nearby_order
from fairseq.memory.index.kmeans.kmeans import Assigner
from fairseq.memory.index.lists.decoding_kernels import decode_bytes, decode_words
from fairseq.memory.index.ops.bounded_scores import Rounding, most_steps
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.index.ops.products import Products
from fairseq.memory.types import Array, Metric
from fairseq.runtime.threads import run_in_threads

if TYPE_CHECKING:
    from fairseq.memory.index.lists.bulk_kernels import BulkKeys

KEPT_BYTES = 2 << 30
"""Lists are kept decoded up to this size, so that the next bulk finds them ready."""
_SAMPLE_ROWS = 16_384
_SURE = 1.01  # sums of remainders are taken in float32
_BATCH_BYTES = 64 << 20
"""Of keys that are decoded at a time where they are not kept."""
_NEARBY_PARTS = 256
_NO_NUMBERS = np.empty(0, np.int64)


def fits_decoded(index: SwigIndex, kept_bytes: int) -> bool:
    """True if an index of product-quantized keys is kept decoded within so many bytes."""
    return has_byte_codes(index) and 5 * int(index.ntotal) * (int(index.d) + 4) <= kept_bytes


class ListRounding(Rounding):
    """Rounds the keys of lists less their centroids; where distances are compared, queries as well, for each list.

    A query is nearer to the centroids of the lists that it probes than to the mean of all keys, in language models'
    states four to ten times: so much closer are the bounds.
    """

    def about_keys(self, mean_D: Tensor) -> Array:
        """See ``Rounding``: what the keys of a list have in common is taken off queries too."""
        about_5D = super().about_keys(mean_D)
        if self.by_distance:
            about_5D[2] = 0.0
        return about_5D

    def for_kernels(self, centroid_LD: Tensor) -> tuple[Array, Array, Array]:
        """What queries are rounded by, see ``bulk_kernels.BulkQueries``."""
        mean_LD = centroid_LD if self.by_distance else self.centre_D.expand_as(centroid_LD)
        about_3D = torch.stack((1.0 / self.balance_D, self._other_D, self._own_D))
        products = self.products
        about_4 = np.array([products.levels, products.zero, self.ratio, _SURE * most_steps(self.width)], np.float32)
        return mean_LD.contiguous().numpy(), about_3D.numpy(), about_4


class DecodedLists:
    """The lists of an index whose keys are product-quantized, a byte a column, or whole, decoded on demand.

    Decoded lists of product-quantized keys are kept, and are several times as large as the index. Of the other kinds
    nothing is kept, which would take a quarter more memory than whole keys and six times that of bytes.
    """

    def __init__(
        self, index: SwigIndex, *, products: Products, deleted: Array | None = None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Take a faiss index of a kind that has ``faiss_library.bulk_queries_per_list``.

        Args:
            products: tiles of an instruction set that columns are multiplied by.
            deleted: rows that must not be found, in rising order.
            kept_bytes: limit on decoded lists of product-quantized keys; if all are larger, none is kept.
        """
        faiss = faiss_library()
        self._index, self.by_distance = index, index.metric_type == faiss.METRIC_L2
        self.num_keys = int(index.ntotal)
        """Keys that were in the lists at the start; once others are added this must not be used any more."""
        self._deleted = np.empty(0, np.int64) if deleted is None else deleted
        self.products = products
        self.centroid_LD = torch.from_numpy(index.quantizer.reconstruct_n(0, index.nlist))
        """Of the lists, float32."""
        quantizer = faiss.downcast_index(index.quantizer)
        self._has_flat_centroids = isinstance(quantizer, faiss.IndexFlat) and quantizer.metric_type == index.metric_type
        self._nearest = Assigner(self.centroid_LD, Metric.L2 if self.by_distance else Metric.IP)
        self._write_decoded = _decoder(index, self.centroid_LD)
        self.is_kept = fits_decoded(index, kept_bytes)
        """Decoded lists serve the next bulk."""
        sample_MD, apart_MD = self._sample()
        # Where distances are compared, queries are less the centroid of each list, as its keys are.
        like_queries_MD = apart_MD if self.by_distance else sample_MD
        self.rounding = ListRounding(like_queries_MD, apart_MD, products, by_distance=self.by_distance)
        """What queries and the keys of all lists are rounded by."""
        self.query_rounding = self.rounding.for_kernels(self.centroid_LD)
        sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
        self._size_L = np.array(sizes, np.int64)
        padded_L = -(-self._size_L // GROUP) * GROUP
        self._padded_L = np.append(padded_L, 0)  # of no list, whose number is -1
        self._place_L = np.append(0, padded_L.cumsum())
        self._all = _Arrays(int(self._place_L[-1]), index.d, self.columns) if self.is_kept else None
        self._is_ready_L = np.zeros(index.nlist, np.bool_)
        self._turn_L2 = np.array([(size, _turn(size)) for size in sizes], np.int64).reshape(-1, 2)
        self._rooms: list[Array] = []
        self._lock, self._preparing = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return int(self._index.nlist)

    @property
    def columns(self) -> int:
        """Columns that are multiplied."""
        return self.products.columns(int(self._index.d))

    def probed_lists(self, query_ND: Tensor) -> Tensor:
        """int64 (N, P): the lists each query probes, nearest first; -1 for none."""
        count = int(self._index.nprobe)
        if not self._has_flat_centroids:
            return torch.from_numpy(search_faiss(self._index.quantizer, query_ND.numpy(), count)[1])
        probed_NP = self._nearest.nearest(query_ND, count)
        odd_N = (probed_NP < 0).any(1)
        if odd_N.any():
            odd_ND = np.ascontiguousarray(query_ND[odd_N].numpy())
            probed_NP[odd_N] = torch.from_numpy(search_faiss(self._index.quantizer, odd_ND, count)[1])
        return probed_NP

    @functools.cached_property
    def ranks(self) -> Array:
        """int64 place of each list in an order in which similar ones are near each other, and last no list's."""
        rank_L = np.empty(len(self) + 1, np.int64)
        rank_L[nearby_order(self.centroid_LD, _NEARBY_PARTS).numpy()] = np.arange(len(self))
        rank_L[-1] = len(self)
        return rank_L

    def padded_sizes(self) -> Array:
        """Places that each list takes: its keys, filled up to whole groups; the last is that of no list."""
        return self._padded_L

    def rooms(self, count: int, size: int) -> list[Array]:
        """Memory for so many groups, uint8 arrays of a size; to be given to :meth:`keep_rooms` in the end, since fresh
        memory takes long to come. A search at the same time takes memory of its own."""
        with self._lock:
            rooms, self._rooms = self._rooms, []
        if len(rooms) < count or len(rooms[0]) < size:
            rooms = [np.empty(size, np.uint8) for _ in range(count)]
        return rooms

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded keys that are kept, all lists of them counted."""
        return 0 if self._all is None else sum(each.nbytes for each in vars(self._all).values())

    def keep_rooms(self, rooms: list[Array]) -> None:
        """Keep memory for the next search."""
        with self._lock:
            self._rooms = rooms

    def batches(
        self, numbers_L: Array, *, share: float = 1.0, rounded: bool = True
    ) -> Iterator[tuple[Array, BulkKeys]]:
        """Some lists, decoded: the numbers of those at hand, in rising order, and their keys.

        Where all are kept they come at once, under their own numbers: the first array is empty.

        Args:
            share: of each list's keys, the first ones, is wanted; more may be there.
            rounded: what products are taken of is wanted as well.
        """
        if self._all is not None:
            whole, first_L = self._all, self._place_L
            with self._preparing:  # no list is written while another search reads it
                fresh = numbers_L[~self._is_ready_L[numbers_L]]
                run_in_threads(
                    lambda number: self._prepare(number, whole, first_L[number]), fresh.tolist(), _one_thread
                )
                self._is_ready_L[fresh] = True
            yield _NO_NUMBERS, whole.keys(first_L, first_L[:-1], self._turn_L2)
            return
        size_L = self._padded_L[numbers_L]
        most = max(int(size_L.max(initial=0)), _BATCH_BYTES // (5 * int(self._index.d)))
        arrays = _Arrays(min(most, int(size_L.sum())), int(self._index.d), self.columns)
        for part in _batches(size_L, most):
            numbers = numbers_L[part]
            first_L = np.append(0, size_L[part].cumsum())
            prepare = [(number, arrays, first) for number, first in zip(numbers.tolist(), first_L.tolist())]
            run_in_threads(lambda each: self._prepare(*each, share, rounded), prepare, _one_thread)
            yield numbers, arrays.keys(first_L, self._place_L[numbers], self._turn_L2[numbers])

    def _prepare(
        self, number: int, arrays: _Arrays, first: int, share: float = 1.0, rounded: bool = True
    ) -> None:  # fmt: skip
        """Decode and round a list. The first of its keys are spread over the list, see ``bulk_kernels.sampler``."""
        size, turn = self._turn_L2[number].tolist()
        wanted = min(size, math.ceil(share * size) + 1)
        at_M = np.arange(wanted) * turn % max(1, size)
        past, end, columns = first + int(self._padded_L[number]), first + wanted, self.columns
        arrays.ids_P[first:end] = self.ids(number)[at_M]
        self._write_keys(number, at_M, arrays.keys_PD[first:end])
        if not rounded:
            return
        key_B = arrays.key_B[first * columns : past * columns]
        given = (self.centroid_LD[number], key_B, arrays.start_P[first:past])
        about_5M = self.rounding.round_keys(arrays.keys_PD[first:end], *given)
        if len(self._deleted):
            about_5M[3, :wanted][np.isin(arrays.ids_P[first:end], self._deleted)] = -np.inf
        arrays.about_5P[:, first:past] = about_5M

    def ids(self, number: int) -> Array:
        """Rows of the store in one list. Raises: ValueError for rows that it cannot have."""
        lists = self._index.invlists
        size = lists.list_size(number)
        if not size:
            return np.empty(0, np.int64)
        rows = np.array(faiss_library().rev_swig_ptr(lists.get_ids(number), size), np.int64)
        for row in (int(rows.min()), int(rows.max())):
            if not 0 <= row < self.num_keys:
                raise ValueError(f"list {number} holds row {row} of {self.num_keys}; the index is damaged: rebuild it")
        return rows

    def _write_keys(self, number: int, at_M: Array, keys_MD: Array) -> None:
        """Write the keys at some places of a list, float32 (M, D)."""
        lists = self._index.invlists
        size = lists.list_size(number)
        if not size:
            return
        codes = faiss_library().rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
        self._write_decoded(codes, at_M, number, keys_MD)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Some keys, and the same less the centroids of their lists."""
        numbers = torch.randperm(self._index.nlist, generator=torch.Generator().manual_seed(0)).tolist()
        parts, apart, count = [torch.empty(0, self._index.d)], [torch.empty(0, self._index.d)], 0
        for number in numbers:
            own_MD = torch.empty(min(self._index.invlists.list_size(number), _SAMPLE_ROWS // 16), self._index.d)
            self._write_keys(number, np.arange(len(own_MD)), own_MD.numpy())
            parts.append(own_MD[own_MD.isfinite().all(1)])
            apart.append(parts[-1] - self.centroid_LD[number])
            count += len(parts[-1])
            if count >= _SAMPLE_ROWS:
                break
        return torch.cat(parts), torch.cat(apart)


class _Arrays:
    """Room for the keys of lists, one after the other; see ``BulkKeys``."""

    def __init__(self, places: int, width: int, columns: int) -> None:
        self.key_B = np.empty(places * columns, np.int8)
        self.start_P = np.empty(places, np.int32)
        self.about_5P = np.empty((5, places), np.float32)
        self.keys_PD = np.empty((places, width), np.float32)
        self.ids_P = np.empty(places, np.int64)

    def keys(self, first_L: Array, place_L: Array, turn_L2: Array) -> BulkKeys:
        """Of lists that begin at ``first_L``."""
        from fairseq.memory.index.lists.bulk_kernels import BulkKeys

        step_P, weight_P, size_P, bias_P, slack_P = self.about_5P
        about = {"step_P": step_P, "weight_P": weight_P, "size_P": size_P, "bias_P": bias_P, "slack_P": slack_P}
        own = {"key_B": self.key_B, "start_P": self.start_P, "keys_PD": self.keys_PD, "ids_P": self.ids_P}
        return BulkKeys(first_L=first_L, place_L=place_L, turn_L2=turn_L2, **own, **about)


def _turn(size: int) -> int:
    """A step by which all of so many are reached, and the first of them lie evenly among all (the golden ratio)."""
    step = max(1, round(0.618034 * size))
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _batches(size_L: Array, most: int) -> Iterator[slice]:
    """Lists that follow each other and have a bounded number of keys together."""
    first = held = 0
    for number, size in enumerate(size_L.tolist()):
        if held + size > most and number > first:
            yield slice(first, number)
            first, held = number, 0
        held += size
    if first < len(size_L):
        yield slice(first, len(size_L))


def _one_thread() -> None:
    """Keep faiss to the calling thread, in that thread only."""
    faiss_library().omp_set_num_threads(1)


def _decoder(index: SwigIndex, centroid_LD: Tensor) -> Callable[[Array, Array, int, Array], None]:
    """What writes keys, float32 (M, D), given the codes of a list, uint8, the places of these keys, and its number."""
    faiss = faiss_library()
    offset_LD = (centroid_LD if index.by_residual else torch.zeros_like(centroid_LD)).numpy()
    if has_byte_codes(index):
        pq = index.pq
        word_SCW = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)

        def write_words(codes_MS: Array, at_M: Array, number: int, keys_MD: Array) -> None:
            decode_words(codes_MS, at_M, word_SCW, offset_LD[number], index.by_residual, keys_MD)

        return write_words
    if type(index).__name__ == "IndexIVFFlat":

        def write_whole(codes_MS: Array, at_M: Array, number: int, keys_MD: Array) -> None:
            np.take(codes_MS.view(np.float32), at_M, axis=0, out=keys_MD, mode="clip")  # other modes write it twice

        return write_whole
    # A column's bytes divide the range that training has seen, and stand for the middles of their parts.
    least_D, range_D = faiss.vector_to_array(index.sq.trained).reshape(2, index.d)
    step_D = range_D / np.float32(255)

    def write_bytes(codes_MS: Array, at_M: Array, number: int, keys_MD: Array) -> None:
        own = (least_D + np.float32(0.5) * step_D, step_D, offset_LD[number])
        decode_bytes(codes_MS[at_M], *own, keys_MD)

    return write_bytes

"""Searches lists of keys for many queries at once, with matrix products of rounded vectors.

Each key is its list centroid plus a residual; residuals are rotated (PCA) so that the leading columns carry most of
their norm. Products of those columns, rounded, and norms of the others bound every score from above (see
``kernels.bound_queries``); only keys whose bound reaches a per-query threshold, which tightens during the scan, are
scored in float32. The neighbours are those of comparing every key.

An index of compressed keys is searched several times faster so than by its own tables.

Shapes: N queries, Q queries of a tile, P lists a query probes, M keys of a list, E columns of the products,
C candidates, G groups of P keys, F candidates of the query that has most, K neighbours, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.lists import kernels
from fairseq.memory.index.lists.residual_kernels import round_residuals
from fairseq.memory.index.ops.candidate_room import capacity
from fairseq.memory.index.ops.kernels import GROUP, LOWEST
from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.index.ops.products import Products
from fairseq.memory.types import Array
from fairseq.runtime.threads import ThreadBuffer, map_in_threads, run_in_threads

_TILE_SCORES = 256 << 10  # 1 MB, which stays near between the product and the scan
_LISTS_AT_A_TIME = 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map (PCA) after which the leading columns carry most of the norm of a vector."""

    basis_DD: Tensor | None
    """Orthogonal; None leaves the vectors as they are."""
    width: int
    """Columns that are multiplied."""

    @classmethod
    def fit(cls, residual_MD: Tensor, dropped_share: float) -> Rotation:
        """Learn it from a sample of keys less the centroids of their lists.

        Args:
            dropped_share: share of their squared lengths that may lie outside of the columns that are multiplied.
        """
        dim = residual_MD.shape[1]
        if not 0.0 < float(residual_MD.square().sum()) < torch.inf:
            return cls(None, dim)
        values_D, basis_DD = torch.linalg.eigh((residual_MD.T @ residual_MD).double())
        share_D = values_D.clamp_min(0.0).cumsum(0) / values_D.clamp_min(0.0).sum()
        width = -(-(dim - int((share_D < dropped_share).sum())) // 16) * 16
        if width > 0.5 * dim:  # rotating and scoring what then passes costs more than multiplying all columns
            return cls(None, dim)
        return cls(basis_DD.flip(1).float().contiguous(), width)

    def __call__(self, rows_MD: Tensor) -> Tensor:
        """Rotate some rows."""
        return rows_MD if self.basis_DD is None else rows_MD @ self.basis_DD


@dataclass(frozen=True)
class PreparedList:
    """A list of keys, ready to be scanned."""

    ids_M: Array
    keys_MD: Array
    """float32, as they are scored."""
    centroid_D: Array
    """Rotated."""
    factors: Tensor
    """The columns that are multiplied, as ``products`` takes them; rows of zeros after them fill up the last group."""
    start_M: Array
    """int32, what raw products begin with."""
    products: Products
    width: int
    """Columns that mean something."""
    step: float
    residual_GP: Array
    """Length of what is not multiplied; keys are in groups of P neighbours."""
    bias_GP: Array
    """For L2 minus the squared length of key less centroid, otherwise its product with the centroid; minus infinity for
    keys that must not be found."""
    largest: Array
    """See ``kernels.bound_queries``."""

    @classmethod
    def of(
        cls,
        ids_M: Array,
        keys_MD: Tensor,
        centroid_D: Tensor,
        rotation: Rotation,
        *,
        by_distance: bool,
        products: Products,
        dead_M: Array | None = None,
    ) -> PreparedList:
        """Prepare float32 keys; ``dead_M`` are the numbers of those that must not be found."""
        if rotation.basis_DD is None and products.is_rounded:
            return cls._rounded(ids_M, keys_MD, centroid_D, by_distance, products, dead_M)
        count, padded = len(keys_MD), -(-max(1, len(keys_MD)) // GROUP) * GROUP
        rotated_MD = rotation(keys_MD - centroid_D)
        leading_MD, width = rotated_MD[:, : rotation.width], rotation.width
        square_M = rotated_MD.square().sum(1)
        residual_M, bias_M = torch.zeros(padded), torch.full((padded,), -torch.inf)
        residual_M[:count] = torch.linalg.vector_norm(rotated_MD[:, width:], dim=1)
        bias_M[:count] = -square_M if by_distance else torch.mv(keys_MD - centroid_D, centroid_D)
        largest_bias = float(bias_M[:count].abs().amax()) if count else 0.0
        if dead_M is not None:
            bias_M[torch.from_numpy(dead_M)] = -torch.inf
        step, quantized_ME = 1.0, torch.zeros(padded, products.columns(width), dtype=products.dtype)
        if products.is_rounded:
            step = max(float(leading_MD.abs().amax()) if count else 0.0, 1e-30) / products.levels
            rounded_MD = (leading_MD / step).round_()
            quantized_ME[:count, :width] = rounded_MD
            rounded_MD *= step
        else:
            quantized_ME[:count, :width] = leading_MD
            rounded_MD = quantized_ME[:count, :width].float()
        longest = [
            float(torch.linalg.vector_norm(rounded_MD, dim=1).amax()) if count else 0.0,
            float(square_M.amax().sqrt()) if count else 0.0,
            float(torch.linalg.vector_norm(leading_MD - rounded_MD, dim=1).amax()) if count else 0.0,
            largest_bias,
        ]
        centroid = np.ascontiguousarray(rotation(centroid_D[None])[0].numpy())
        groups = (residual_M.view(-1, GROUP).numpy(), bias_M.view(-1, GROUP).numpy())
        arrays = (*groups, np.array(longest, np.float32))
        multiplied = (*products.lay_out(quantized_ME), products, width)
        return cls(ids_M, np.ascontiguousarray(keys_MD.numpy()), centroid, *multiplied, step, *arrays)

    @property
    def columns(self) -> int:
        """Columns of products: the keys, filled up to whole groups."""
        return self.bias_GP.size

    def bounded(
        self, rotated_ND: Array, row_Q: Array, *, by_distance: bool, buffer: ThreadBuffer
    ) -> tuple[Array, Array]:
        """Products of some queries, in groups of P keys (Q, G, P), and what bounds their scores, (Q, 4).

        See ``kernels.bound_queries``. The products are valid until the thread asks for the next.
        """
        products = self.products
        quantized_QE = torch.zeros(len(row_Q), products.columns(self.width), dtype=products.dtype)
        bound_Q4 = np.empty((len(row_Q), 4), np.float32)
        kernels.bound_queries(
            rotated_ND, row_Q, self.centroid_D, by_distance, self.width, self.largest, np.float32(products.levels),
            products.zero, quantized_QE.numpy(), bound_Q4,
        )  # fmt: skip
        raw_QM = buffer(len(row_Q), self.columns)
        products.multiply(quantized_QE, self.factors, self.start_M, raw_QM)
        return raw_QM.view(len(row_Q), -1, GROUP).numpy(), bound_Q4

    @classmethod
    def _rounded(
        cls,
        ids_M: Array,
        keys_MD: Tensor,
        centroid_D: Tensor,
        by_distance: bool,
        products: Products,
        dead_M: Array | None,
    ) -> PreparedList:
        """The same where all columns are multiplied, as 8-bit integers."""
        (count, width), padded = keys_MD.shape, -(-max(1, len(keys_MD)) // GROUP) * GROUP
        keys, centroid = np.ascontiguousarray(keys_MD.numpy()), np.ascontiguousarray(centroid_D.numpy())
        quantized_ME = torch.empty(padded, products.columns(width), dtype=torch.int8)
        quantized_ME[:, width:], quantized_ME[count:] = 0, 0
        bias_M, largest = np.full(padded, -np.inf, np.float32), np.zeros(4, np.float32)
        levels, rounded = np.float32(products.levels), quantized_ME.numpy()
        step = round_residuals(keys, centroid, by_distance, levels, rounded, bias_M[:count], largest)
        largest[3] = np.abs(bias_M[:count]).max(initial=0.0)
        if dead_M is not None:
            bias_M[dead_M] = -np.inf
        groups = (np.zeros((padded // GROUP, GROUP), np.float32), bias_M.reshape(-1, GROUP))
        multiplied = (*products.lay_out(quantized_ME), products, width)
        return cls(ids_M, keys, centroid, *multiplied, float(step), *groups, largest)


class Lists(Protocol):
    """Lists that can be searched; higher scores are closer."""

    by_distance: bool
    """Scores are minus squared distances, otherwise inner products."""
    products: Products
    """What columns are multiplied by: 8-bit integers or float32."""

    def probed_lists(self, query_ND: Tensor) -> Tensor:
        """int64 (N, P): the lists each query probes, nearest first; -1 for none."""
        ...

    def __len__(self) -> int: ...

    def prepare(self, number: int) -> PreparedList:
        """One list. Called in several threads."""
        ...

    def rotated(self, query_ND: Tensor) -> Tensor:
        """Queries rotated as the keys are."""
        ...

    def use_one_thread(self) -> None:
        """Called in each thread: whatever is computed there must start no more threads."""
        ...


@dataclass(frozen=True)
class ListNeighbors:
    """The neighbours that a search in lists returns."""

    ids_NK: Tensor
    """int64, -1 where there were fewer."""
    scores_NK: Tensor
    """float32, minus infinity there."""
    open_N: Tensor
    """int64: queries whose neighbours must be found in another way, since too many keys are equally close."""


def search_lists(lists: Lists, query_ND: Tensor, k: int, doubt_N: Tensor | None = None) -> ListNeighbors:
    """The k best keys of the probed lists, best first, of equals the lower id; at place k those that faiss would take.

    Args:
        query_ND: float32.
        doubt_N: keys whose scores differ by no more may be in another order in faiss: queries with such keys around
            place k are left open, unless the scores are equal to the last bit.
    """
    count = len(query_ND)
    doubt_N = torch.zeros(count) if doubt_N is None else doubt_N
    probed_NP = lists.probed_lists(query_ND).numpy()
    threads = torch.get_num_threads()
    size = max(1, -(-count // threads))
    starts = range(0, count, size)
    groups = [_ScanGroup(lists, query_ND, probed_NP, slice(at, at + size), k, doubt_N[at : at + size]) for at in starts]
    # The nearest list holds most of the neighbours: after it few keys of the others reach a query's threshold.
    for ranks in (slice(0, 1), slice(1, None)):
        numbers = _numbers(probed_NP[:, ranks])
        for first in range(0, len(numbers), _LISTS_AT_A_TIME):
            batch = numbers[first : first + _LISTS_AT_A_TIME]
            prepared = dict(zip(batch, map_in_threads(lists.prepare, batch, lists.use_one_thread)))
            run_in_threads(functools.partial(_ScanGroup.scan, prepared=prepared, ranks=ranks), groups)
    ids_NK = torch.full((count, k), -1, dtype=torch.int64)
    scores_NK = torch.full((count, k), -torch.inf)
    open_parts = list(map_in_threads(lambda group: group.write_best(ids_NK, scores_NK), groups))
    return ListNeighbors(ids_NK, scores_NK, torch.from_numpy(np.concatenate([np.empty(0, np.int64), *open_parts])))


def _numbers(probed_NP: Array) -> list[int]:
    numbers: list[int] = np.unique(probed_NP[probed_NP >= 0]).tolist()
    return numbers


class _ScanGroup:
    """Some queries and the candidates they hold. Scanned by one thread at a time."""

    def __init__(self, lists: Lists, query_ND: Tensor, probed_NP: Array, rows: slice, k: int, doubt_N: Tensor) -> None:
        self._lists, self._k, self._first = lists, k, rows.start
        self._query_ND = np.ascontiguousarray(query_ND[rows].numpy())
        self._rotated_ND = np.ascontiguousarray(lists.rotated(query_ND[rows]).numpy())
        self._probed_NP = probed_NP[rows]
        count, room = len(self._query_ND), capacity(k)
        self._heap = kernels.CandidateHeap(
            score_NC=np.empty((count, room), np.float32),
            ids_NC=np.empty((count, room), np.int64),
            order_NC=np.empty((count, room), np.int64),
            filled_N=np.zeros(count, np.int64),
            threshold_N=np.full(count, LOWEST, np.float32),
            doubt_N=doubt_N.numpy(),
            is_open_N=np.zeros(count, np.bool_),
        )
        self._buffer = ThreadBuffer(_TILE_SCORES, lists.products.raw_dtype)
        self._queries_of_list: dict[tuple[int, int | None], dict[int, tuple[Array, Array]]] = {}

    def scan(self, prepared: dict[int, PreparedList], ranks: slice) -> None:
        """Scan some lists for the queries that probe them at these ranks."""
        queries_of_list = self._queries_at(ranks)
        for number, keys in prepared.items():
            if not len(keys.ids_M) or number not in queries_of_list:
                continue
            row_N, order_N = queries_of_list[number]
            tile = max(1, _TILE_SCORES // keys.columns)
            bound_F = np.empty(keys.columns, np.float32)
            for start in range(0, len(row_N), tile):
                self._scan_tile(keys, row_N[start : start + tile], order_N[start : start + tile], bound_F)

    def _queries_at(self, ranks: slice) -> dict[int, tuple[Array, Array]]:
        """The queries that probe each list, and in which order."""
        key = (ranks.start, ranks.stop)
        if key not in self._queries_of_list:
            flat = self._probed_NP[:, ranks].reshape(-1)
            order = np.argsort(flat, kind="stable")
            numbers, starts = np.unique(flat[order], return_index=True)
            width = max(1, self._probed_NP[:, ranks].shape[1])
            parts = np.split(order, starts[1:]) if len(starts) else []
            self._queries_of_list[key] = {
                int(number): (part // width, (part % width + ranks.start) << 32) for number, part in zip(numbers, parts)
            }
        return self._queries_of_list[key]

    def _scan_tile(self, keys: PreparedList, row_Q: Array, order_Q: Array, bound_F: Array) -> None:
        by_distance = self._lists.by_distance
        raw_QGP, bound_Q4 = keys.bounded(self._rotated_ND, row_Q, by_distance=by_distance, buffer=self._buffer)
        queries = kernels.ScannedQueries(self._query_ND, row_Q, order_Q, bound_Q4)
        scanned = kernels.ScannedKeys(keys.residual_GP, keys.bias_GP, keys.ids_M, keys.keys_MD)
        kernels.scan(
            raw_QGP,
            np.float32(keys.step),
            tuple(queries),
            tuple(scanned),
            tuple(self._heap),
            by_distance,
            self._k,
            bound_F,
        )

    def write_best(self, ids_NK: Tensor, scores_NK: Tensor) -> Array:
        """Write the k best candidates, best first. Returns: queries that are left open."""
        k, heap = self._k, self._heap
        kernels.prune_group(tuple(heap), k)
        most = max(1, int(heap.filled_N.max(initial=0)))
        heap.score_NC[:, :most][np.arange(most) >= heap.filled_N[:, None]] = -np.inf
        place_NF = argsort_descending(heap.score_NC[:, :most])
        rows_of_heap = (heap.score_NC, heap.ids_NC, heap.order_NC)
        score_NF, ids_NF, order_NF = (np.take_along_axis(x[:, :most], place_NF, 1) for x in rows_of_heap)
        kernels.order_equals(score_NF, ids_NF, order_NF, heap.filled_N)
        if most > k:
            self._settle(score_NF, ids_NF, order_NF)
        ids_NF[np.arange(most) >= heap.filled_N[:, None]] = -1
        rows, count_best = slice(self._first, self._first + len(score_NF)), min(k, most)
        ids_NK[rows, :count_best] = torch.from_numpy(ids_NF[:, :count_best])
        scores_NK[rows, :count_best] = torch.from_numpy(score_NF[:, :count_best])
        open_N: Array = np.flatnonzero(heap.is_open_N) + self._first
        return open_N

    def _settle(self, score_NF: Array, ids_NF: Array, order_NF: Array) -> None:
        """Ties around place k as faiss would have them; what is close but not equal is left open."""
        k, edge_N1 = self._k, score_NF[:, self._k - 1 : self._k]
        with np.errstate(invalid="ignore"):
            close_NF = np.abs(score_NF - edge_N1) <= self._heap.doubt_N[:, None]
        is_close_N = close_NF[:, k:].any(1)
        is_equal_N = ~(close_NF & (score_NF != edge_N1)).any(1)
        tied_H = np.flatnonzero(is_close_N & is_equal_N)
        kernels.settle_ties(score_NF, ids_NF, order_NF, self._heap.filled_N, k, tied_H, self._lists.by_distance)
        self._heap.is_open_N[:] |= is_close_N & ~is_equal_N

"""Exact search over the keys themselves: no index file, and the oracle that other indexes are measured by.

The keys are streamed once for as many queries as memory allows. Approximate scores with a bounded error (see
``filters``) meet a threshold of each query that rises as keys go by, so that few survive (``candidates``); the
survivors are scored again in float32.

Shapes: N queries, Q queries of a group, M keys of a block, K neighbours, D width.
"""

from __future__ import annotations

import functools
import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray, to_storage_dtype
from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.exact.candidates import CandidateGroup, TrueScores
from fairseq.memory.index.exact.row_scores import score_rows
from fairseq.memory.index.lists.search import PreparedList, Rotation, search_lists
from fairseq.memory.index.ops import products as ways
from fairseq.memory.index.ops.bounded_scores import KeyBlock, RoundedQueries
from fairseq.memory.index.ops.candidate_room import CANDIDATE_BYTES, capacity
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.index.ops.products import has_fast_int8
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.threads import ThreadBuffer, map_in_threads, run_in_threads

T = TypeVar("T")
DEFAULT_MEMORY = 2 << 30
_BLOCK_BYTES = 8 << 20  # of keys in float32
_MAX_BLOCK_ROWS = 4096
_GROUP_SCORES = 512 << 10  # of a group of queries with a block: 2 MB, which stay in the CPU's cache
_TILE_BYTES = 8 << 20  # of keys that are scored again at a time, for all queries
_FEW_QUERIES = 32  # reading the keys costs more than their products: nothing is gained by rounding them first
_SAMPLE_ROWS = 4096
_DROPPED_SHARE = 0.03  # see Rotation.fit
# Scoring at once what may be near, as in lists, does not pay while the best are few: 65,536 keys of width 1024, k 1,
# take 0.27 of the time when the best are scored after all keys have gone by.
_FEW_PRODUCTS = 1 << 15
# So it does where bounds are wide beside the differences of the best scores, as those of keys with a few outlying
# columns are: 60,000 keys of SmolLM2 (width 576, k 256) take an eighth of the time.
_WIDE = 0.3
_NEAREST = 64


class ExactIndex:
    """Exact search over the keys themselves, without an index file; the reference for all other indexes.

    Keys are read block by block, so a memory-mapped store may be larger than RAM.

    ```python
    index = ExactIndex(store.keys, Metric.IP)
    index.search(query_ND, k=4).ids_NK
    ```
    """

    def __init__(
        self,
        keys: ChunkedArray | Array | Tensor,
        metric: Metric = Metric.L2,
        *,
        memory_bytes: int = DEFAULT_MEMORY,
        deleted: Array | None = None,
    ) -> None:
        """Args.

        keys: (rows, dim), any floating type; memory-mapped arrays are read as needed. Tensors must be on the CPU.
        metric: similarity of query and key.
        memory_bytes: limit on working memory, results excluded; queries are searched in as many bulks as that needs.
        deleted: int64 rows that are never found, ascending; None for none.
        Raises: ValueError for keys that are not a matrix of floating-point numbers.
        """
        self.keys = _key_rows(keys)
        self.metric = metric
        self.memory_bytes = memory_bytes
        self.deleted = np.empty(0, np.int64) if deleted is None else deleted
        self._bounds_are_wide: bool | None = None

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def __str__(self) -> str:
        return f"exact search of {len(self)} rows of width {self.dim}, {self.metric.value}"

    streams_keys = True

    def bulk_pays(self, num_queries: int) -> bool:
        """True for more than one query: the keys are read once for all of them."""
        return num_queries > 1

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query, float32 (N, M); -inf for the id -1."""
        check_queries(query_ND, self.dim)
        return score_rows(self.keys, self.metric, query_ND.detach().float().cpu().contiguous(), ids_NM)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query (N, D), best first; the lower row wins a tie.

        A query with an infinity or a NaN has none: its ids are -1 and its scores -inf, as those of faiss.

        Raises: ValueError if k exceeds the rows that are not deleted, or the width does not fit.
        """
        check_k(k, len(self) - len(self.deleted))
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu().contiguous()
        # No score reaches a threshold that is NaN, and rows that nothing was written to would be returned.
        broken_N = ~query_ND.isfinite().all(1)
        any_broken = bool(broken_N.any())
        query_ND = query_ND.masked_fill(broken_N[:, None], 0.0) if any_broken else query_ND
        query_ND = normalized(query_ND) if self.metric is Metric.COS else query_ND
        ids_NK = torch.empty(len(query_ND), k, dtype=torch.int64)
        scores_NK = torch.empty(len(query_ND), k)
        bulk = max(1, self.memory_bytes // (CANDIDATE_BYTES * capacity(k) + 12 * self.dim))
        blocks = self._as_lists(query_ND, k)
        for part in _slices(len(query_ND), bulk):
            if blocks is not None:
                neighbors = search_lists(blocks, query_ND[part], k)
                ids_NK[part], scores_NK[part] = neighbors.ids_NK, neighbors.scores_NK
            else:
                _Search(self, query_ND[part], k).run(ids_NK[part], scores_NK[part])
        if any_broken:
            ids_NK[broken_N], scores_NK[broken_N] = -1, -torch.inf
        return Neighbors(ids_NK, scores_NK)

    def _as_lists(self, query_ND: Tensor, k: int) -> _Blocks | None:
        """The blocks to be searched as lists, where that is faster."""
        if len(query_ND) < _FEW_QUERIES:
            return None
        if k * self.dim <= _FEW_PRODUCTS:
            return None
        if self._rotation.basis_DD is not None:
            return _Blocks(self, self._rotation)
        if self._bounds_are_wide is None:  # decided by the first queries for all: it takes a few hundredths of a second
            self._bounds_are_wide = self._has_wide_bounds(query_ND)
        return _Blocks(self, self._rotation) if self._bounds_are_wide else None

    def _has_wide_bounds(self, query_ND: Tensor) -> bool:
        """True if many of the best scores of a sample are closer to each other than their bounds."""
        sample_MD, query_QD = self.sample, query_ND[:_FEW_QUERIES]
        count = min(_NEAREST, len(sample_MD) - 1)
        if count < 1 or not has_fast_int8():
            return False
        queries = RoundedQueries(query_QD, sample_MD, ways.chosen(), by_distance=self.metric is Metric.L2)
        margin_Q = torch.from_numpy(queries.about_N4[:, 2] * np.median(queries.block(sample_MD).about_5M[2]))
        scores_QM = query_QD @ sample_MD.T
        if self.metric is Metric.L2:
            scores_QM -= 0.5 * sample_MD.square().sum(1)
        best_QK = scores_QM.topk(count + 1, dim=1).values
        # The very best may be the query itself.
        spread_Q = best_QK[:, min(16, count - 1)] - best_QK[:, -1]
        return bool((margin_Q > _WIDE * spread_Q).float().mean() > 0.5)

    @functools.cached_property
    def _rotation(self) -> Rotation:
        """Rotates keys so that few columns hold nearly all of their length; learned from a sample."""
        return Rotation.fit(self.sample - self.sample.mean(0), _DROPPED_SHARE)

    @functools.cached_property
    def sample(self) -> Tensor:
        """Some keys, float32, spread over the store; for the cosine of length one."""
        step = max(1, len(self.keys) // _SAMPLE_ROWS)
        sample_MD = self.keys.take(torch.arange(0, len(self.keys), step)[:_SAMPLE_ROWS])
        return normalized(sample_MD) if self.metric is Metric.COS else sample_MD


class _Blocks:
    """The blocks of a store as lists that all queries probe. See ``ExactIndex._as_lists``."""

    ties_by_id = True

    def __init__(self, index: ExactIndex, rotation: Rotation) -> None:
        self._index, self._rotation = index, rotation
        self.by_distance = index.metric is Metric.L2
        self.products = ways.chosen() if has_fast_int8() else ways.by_name("float32")
        self._rows = _slices(len(index), _block_rows(index.dim))

    def __len__(self) -> int:
        return len(self._rows)

    def probed_lists(self, query_ND: Tensor) -> None:
        """See ``Lists``."""

    def rotated(self, query_ND: Tensor) -> Tensor:
        """See ``Lists``."""
        return self._rotation(query_ND)

    def prepare(self, number: int) -> PreparedList:
        """See ``Lists``."""
        rows, deleted = self._rows[number], self._index.deleted
        keys_MD = self._index.keys.block(rows.start, rows.stop).float()
        keys_MD = normalized(keys_MD) if self._index.metric is Metric.COS else keys_MD
        first, past = np.searchsorted(deleted, (rows.start, rows.stop))
        return PreparedList.of(
            np.arange(rows.start, rows.stop),
            keys_MD,
            keys_MD.mean(0),
            self._rotation,
            by_distance=self.by_distance,
            products=self.products,
            dead_M=deleted[first:past] - rows.start if first < past else None,
        )

    def use_one_thread(self) -> None:
        """Nothing here starts threads."""


class _Search:
    """One bulk of queries against all keys."""

    def __init__(self, index: ExactIndex, query_ND: Tensor, k: int, *, guess: bool = True) -> None:
        self._index, self._k, self._guess = index, k, guess
        self.keys, self.metric, self.deleted, self.query_ND = index.keys, index.metric, index.deleted, query_ND
        rows = _block_rows(index.dim)
        self.blocks = _slices(len(self.keys), rows)
        self.tiles = _slices(len(self.keys), max(1, _TILE_BYTES // (4 * max(1, index.dim))))
        products = ways.chosen() if len(query_ND) >= _FEW_QUERIES else ways.by_name("float32")
        self.queries = RoundedQueries(query_ND, index.sample, products, by_distance=self.metric is Metric.L2)
        size = max(1, min(_GROUP_SCORES // rows, -(-len(query_ND) // torch.get_num_threads())))
        size = -(-size // max(1, products.tile_rows)) * max(1, products.tile_rows)
        self.scores = TrueScores(self.keys, self.metric, query_ND)
        self.groups = [CandidateGroup(part, k, self.queries, self.scores) for part in _slices(len(query_ND), size)]
        self._buffer = ThreadBuffer(size * rows, products.raw_dtype)

    def run(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best rows and their scores."""
        self._expect()
        ahead = 2 * torch.get_num_threads()
        for first in range(0, len(self.blocks), ahead):
            rows = self.blocks[first : first + ahead]
            blocks = list(zip(rows, map_in_threads(self._block, rows)))
            run_in_threads(functools.partial(self._scan, blocks), self.groups)
        # First the k of each query that promise most: what they truly reach spares many of the others.
        run_in_threads(lambda group: group.select_first(), self.groups)
        disappointed = np.concatenate([group.disappointed() for group in self.groups])
        run_in_threads(self._score, self.tiles)
        run_in_threads(lambda group: group.select_remaining(), self.groups)
        run_in_threads(self._score, self.tiles)
        run_in_threads(lambda group: group.write_best(ids_NK, scores_NK), self.groups)
        if len(disappointed) and self._guess:
            again = torch.from_numpy(disappointed)
            neighbors = (ids_NK[again], scores_NK[again])
            _Search(self._index, self.query_ND[again], self._k, guess=False).run(*neighbors)
            ids_NK[again], scores_NK[again] = neighbors

    def _expect(self) -> None:
        """Let groups begin with a threshold: of the keys that go by before there is one, all would be candidates."""
        sample_MD = self._index.sample
        expected = self._k * len(sample_MD) / len(self.keys)
        rank = math.ceil(expected + 4.0 * math.sqrt(expected) + 4.0)  # too few in one of 10,000 queries
        if not self._guess or len(sample_MD) * 8 > len(self.keys) or rank > len(sample_MD) // 4:
            return
        whole = self.queries.block(sample_MD)
        run_in_threads(lambda group: group.expect(whole, rank, self._buffer), self.groups)

    def _block(self, rows: slice) -> KeyBlock:
        keys_MD = self.keys.block(rows.start, rows.stop)
        block = self.queries.block(normalized(keys_MD.float()) if self.metric is Metric.COS else keys_MD)
        first, past = np.searchsorted(self.deleted, (rows.start, rows.stop))
        block.drop(self.deleted[first:past] - rows.start)
        return block

    def _scan(self, blocks: list[tuple[slice, KeyBlock]], group: CandidateGroup) -> None:
        for rows, block in blocks:
            group.take(block, rows.start, self._buffer)

    def _score(self, rows: slice) -> None:
        keys_MD = self.scores.rows(rows)
        for group in self.groups:
            group.score(keys_MD, rows.start)


def _block_rows(dim: int) -> int:
    return min(_MAX_BLOCK_ROWS, max(GROUP, _BLOCK_BYTES // (4 * max(1, dim)) // GROUP * GROUP))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _key_rows(keys: ChunkedArray | Array | Tensor) -> ChunkedArray:
    if isinstance(keys, Tensor):
        dtype = str(keys.dtype).removeprefix("torch.")
        keys = ChunkedArray([to_storage_dtype(keys.detach(), dtype) if dtype in KEY_DTYPES else keys.numpy()], dtype)
    keys = ChunkedArray.of(keys)
    if len(keys.shape) != 2 or keys.dtype not in (*KEY_DTYPES, "float64"):
        raise ValueError(
            f"keys of shape {keys.shape} and type {keys.dtype} cannot be searched; give a matrix (rows, dim) of "
            "float32, float16, bfloat16 or float64"
        )
    return keys

"""Exact search over the keys themselves: no index file, and the oracle that other indexes are measured by.

The keys are streamed once for as many queries as memory allows. Approximate scores with a bounded error (see
``bounded_scores``) meet a threshold of each query that rises as keys go by, so that few survive (``candidates``); the
survivors are scored again in float32.

Shapes: N queries, Q queries of a group, M keys of a block, K neighbours, D width.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray, to_storage_dtype
from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.datastore.reading.read_ahead import ReadAhead
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.candidates.room import CANDIDATE_BYTES, capacity
from fairseq.memory.index.exact.candidates import CandidateGroup, TrueScores
from fairseq.memory.index.exact.gpu import ExactGpuSearch
from fairseq.memory.index.exact.kept_keys import SAMPLE, Keeper
from fairseq.memory.index.exact.kernels import score_all
from fairseq.memory.index.exact.row_scores import score_rows
from fairseq.memory.index.exact.streamed import StreamedGroup
from fairseq.memory.index.ops import products as ways
from fairseq.memory.index.ops.bounded_scores import KeyBlock, RoundedQueries
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.index.ops.products import has_fast_int8
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.threads import ThreadBuffer, map_in_threads, run_in_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_MEMORY = 2 << 30
_BLOCK_BYTES = 8 << 20  # of keys in float32
_MAX_BLOCK_ROWS = 4096
_GROUP_SCORES = 512 << 10  # of a group of queries with a block: 2 MB, which stay in the CPU's cache
_TILE_BYTES = 8 << 20  # of keys that are scored again at a time, for all queries
_KEPT_SHARE = 4
_FEW_QUERIES = 32  # reading the keys costs more than their products: nothing is gained by rounding them first
_SAMPLE_ROWS = 4096
_SAMPLE_SHARE = 64  # of fewer keys, one of so many: what is done with the sample is done for all of them as well
_LEAST_SAMPLE_ROWS = 512
# Of few neighbours few keys are scored, however wide the bounds are.
FEW_PRODUCTS = 1 << 15
# Where bounds are wide beside the differences of the best scores, many keys pass. Then they are scored as they pass by,
# so that thresholds are true scores: 65,536 keys of a GPT-2 of width 1024, k 1024, take 0.46 of the time by AVX2.
_WIDE = 0.3
# For a column of a key that bounds let through, and more the more of these are kept, up to so many neighbours.
_PASSING_SECONDS, _KEEPING_SECONDS, _KEPT = 2e-10, 1.5e-10, 1024
_ROUNDING_SECONDS = 6e-10  # for a column of a key, whatever the queries
_NEAREST = 64
# Queries are far that are so many times as long as the others, or so long that squares of float32 end.
_FAR, _LONGEST = 1e4, 1e15


class ExactIndex:
    """Exact search over the keys themselves, without an index file; the reference for all other indexes.

    Keys are read block by block, so a memory-mapped store may be larger than RAM: it is then read once for each bulk of
    queries, ahead of the products and around the page cache.

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
            Rounded keys that take a quarter of it at most are kept from the second bulk on.
        deleted: int64 rows that are never found, ascending; None for none.
        Raises: ValueError for keys that are not a matrix of floating-point numbers.
        """
        self.keys = _key_rows(keys)
        self.metric = metric
        self.memory_bytes = memory_bytes
        self.deleted = np.empty(0, np.int64) if deleted is None else deleted
        self._bounds_are_wide: bool | None = None
        self._passing: dict[tuple[int, str], float] = {}
        self._by_gpu: ExactGpuSearch | None = None
        self.keeper = Keeper(len(self.keys), memory_bytes // _KEPT_SHARE if not self.keys.exceeds_ram else 0)

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the rounded keys that are kept for the next bulk."""
        return self.keeper.num_bytes

    def __len__(self) -> int:
        return len(self.keys)

    def __str__(self) -> str:
        return f"exact search of {len(self)} rows of width {self.dim}, {self.metric.value}"

    streams_keys = True

    def bulk_pays(self, num_queries: int) -> bool:
        """True for more than one query: the keys are read once for all of them."""
        return num_queries > 1

    def use_gpus(self, device: torch.device | str | None = None, *, resident_bytes: int | None = None) -> None:
        """Search on a GPU, with the same results bit by bit; logs one line where there is none, or no Triton.

        Args:
            device: by default the current GPU.
            resident_bytes: keys of at most this size stay there between searches; by default half of its free memory.
        """
        self._by_gpu = ExactGpuSearch.of(
            self.keys,
            self.metric,
            self.deleted,
            device,
            memory_bytes=self.memory_bytes,
            resident_bytes=resident_bytes,
        )

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
        left_N = self._search_on_gpu(query_ND, k, ids_NK, scores_NK)
        if left_N is None:
            self._search_on_cpu(query_ND, k, ids_NK, scores_NK)
        elif len(left_N):
            left = torch.from_numpy(left_N)
            left = left[~broken_N[left]]
            _write_rows(left, ids_NK, scores_NK, lambda *found: self._search_on_cpu(query_ND[left], k, *found))
        if any_broken:
            ids_NK[broken_N], scores_NK[broken_N] = -1, -torch.inf
        return Neighbors(ids_NK, scores_NK)

    def _search_on_gpu(self, query_ND: Tensor, k: int, ids_NK: Tensor, scores_NK: Tensor) -> Array | None:
        """Numbers of the queries that the CPU must search; None for all of them."""
        if self._by_gpu is None:
            return None
        try:
            return self._by_gpu.search(query_ND, k, ids_NK, scores_NK)
        except RuntimeError as error:  # no memory left, or a kernel that the GPU cannot run
            logger.warning("keys are searched on the CPU from now on: the GPU cannot (%s)", error)
            self._by_gpu = None
            return None

    def _search_on_cpu(self, query_ND: Tensor, k: int, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best rows and their scores, in as many bulks as the memory asks for."""
        bulk = max(1, self.memory_bytes // (CANDIDATE_BYTES * capacity(k) + 12 * self.dim))
        for part in _slices(len(query_ND), bulk):
            _run(self, query_ND[part], k, ids_NK[part], scores_NK[part])

    def has_wide_bounds(self, query_ND: Tensor, k: int) -> bool:
        """True if many of the best scores of a sample are closer to each other than their bounds.

        The first queries decide it for all: it takes a few hundredths of a second.
        """
        if len(query_ND) < _FEW_QUERIES or k * self.dim <= FEW_PRODUCTS:
            return False
        if self._bounds_are_wide is None:
            self._bounds_are_wide = self._has_wide_bounds(query_ND)
        return self._bounds_are_wide

    def _has_wide_bounds(self, query_ND: Tensor) -> bool:
        sample_MD, query_QD = self.sample, query_ND[:_FEW_QUERIES]
        count = min(_NEAREST, len(sample_MD) - 1)
        if count < 1 or not has_fast_int8():
            return False
        margin_Q, scores_QM = self._margins(query_QD, self.chosen_products)
        best_QK = scores_QM.topk(count + 1, dim=1).values
        # The very best may be the query itself.
        spread_Q = best_QK[:, min(16, count - 1)] - best_QK[:, -1]
        return bool((margin_Q > _WIDE * spread_Q).float().mean() > 0.5)

    @property
    def chosen_products(self) -> ways.Products:
        """What is fastest on this processor, for columns as many as the keys'."""
        return ways.for_width(ways.chosen(), self.dim)

    def products_for(self, query_ND: Tensor, k: int) -> ways.Products:
        """What queries and keys are multiplied by: numbers rounded coarsely, finely or not at all.

        The first queries tell how many keys pass the bounds of each.
        """
        products = self.chosen_products
        if not products.is_rounded or ways.is_forced():
            return products
        rates = ways.measured()
        if products.name not in rates:
            return products
        fine, full = ways.finer(products, self.dim), ways.by_name("float32")
        known = [(products, 1.0 / rates[products.name]), (full, 1.0 / rates[full.name])]
        if fine is not None:
            known.append((fine, fine.cost / rates[products.name]))
        cost, per_passing = {}, _PASSING_SECONDS + _KEEPING_SECONDS * min(1.0, k / _KEPT)
        for way, seconds in known:
            rounding = _ROUNDING_SECONDS * (2.0 if way.is_fine else 1.0) / len(query_ND)
            if (k, way.name) not in self._passing:
                self._passing[k, way.name] = self._passing_share(query_ND[:_FEW_QUERIES], k, way)
            elif self.keeper.may_keep(way, self.dim):  # once for all bulks to come
                rounding = 0.0
            cost[way] = seconds + self._passing[k, way.name] * per_passing + rounding
        return min(cost, key=lambda way: cost[way])

    def _passing_share(self, query_QD: Tensor, k: int, products: ways.Products) -> float:
        """The share of the keys, beside the k best, that bounds let through, by a sample."""
        margin_Q, scores_QM = self._margins(query_QD, products)
        count = len(self.sample)
        rank = min(count, max(1, round(k * count / len(self))))
        least_Q = scores_QM.topk(rank, dim=1).values[:, -1] - 2.0 * margin_Q
        passing = float((scores_QM >= least_Q[:, None]).float().mean())
        return max(0.0, passing - rank / count)

    def _margins(self, query_QD: Tensor, products: ways.Products) -> tuple[Tensor, Tensor]:
        """How far bounds are from scores, (Q,), and the scores of the sample, (Q, M).

        They are those of ``bounded_scores``, up to what is the same for all keys of a query.
        """
        sample_MD, by_distance = self.sample, self.metric is Metric.L2
        queries = RoundedQueries(query_QD, sample_MD, products, by_distance=by_distance)
        margin_Q = torch.from_numpy(queries.about_N4[:, 2] * np.median(queries.block(sample_MD).about_5M[2]))
        scores_QM = query_QD @ sample_MD.T
        return margin_Q, scores_QM - 0.5 * sample_MD.square().sum(1) if by_distance else scores_QM

    @functools.cached_property
    def sample(self) -> Tensor:
        """Some keys that are not deleted, float32, spread over the store; for the cosine of length one.

        One is drawn from each of many stretches: the first tokens of blocks, far from all others, come at equal steps.
        """
        count = min(_SAMPLE_ROWS, max(_LEAST_SAMPLE_ROWS, len(self.keys) // _SAMPLE_SHARE))
        step = max(1, len(self.keys) // count)
        start = np.arange(0, len(self.keys), step)[:count]
        drawn = np.minimum(start + np.random.default_rng(0).integers(0, step, len(start)), len(self.keys) - 1)
        rows = np.setdiff1d(drawn, self.deleted)
        if not len(rows):
            rows = np.setdiff1d(np.arange(min(len(self.keys), len(self.deleted) + count)), self.deleted)
        sample_MD = self.keys.take(torch.from_numpy(rows))
        sample_MD = sample_MD[sample_MD.isfinite().all(1)]
        sample_MD = sample_MD if len(sample_MD) else sample_MD.new_zeros(1, self.dim)
        return normalized(sample_MD) if self.metric is Metric.COS else sample_MD


def _run(index: ExactIndex, query_ND: Tensor, k: int, ids_NK: Tensor, scores_NK: Tensor, *, guess: bool = True) -> None:
    """Write the k best rows of each query and their scores; ``guess`` as in ``_Search``."""
    if len(query_ND) < _FEW_QUERIES and not index.keys.exceeds_ram:
        _search_few(index, query_ND, k, ids_NK, scores_NK)
        return
    # A query far from all others would make the steps of all as long as its own.
    length_N = torch.linalg.vector_norm(query_ND.double(), dim=1)
    is_far_N = length_N > torch.clamp(_FAR * length_N.median(), max=_LONGEST)
    near, far = ((is_far_N == is_far).nonzero()[:, 0] for is_far in (False, True))
    if not len(far):
        _Search(index, query_ND, k, guess=guess).run(ids_NK, scores_NK)
        return
    for part in far.split(_FEW_QUERIES - 1):
        _write_rows(part, ids_NK, scores_NK, functools.partial(_search_few, index, query_ND[part], k))
    if len(near):
        _write_rows(near, ids_NK, scores_NK, _Search(index, query_ND[near], k, guess=guess).run)


def _write_rows(rows: Tensor, ids_NK: Tensor, scores_NK: Tensor, search: Callable[[Tensor, Tensor], None]) -> None:
    """Let a search write what it finds for the queries with these numbers."""
    found = (ids_NK[rows], scores_NK[rows])
    search(*found)
    ids_NK[rows], scores_NK[rows] = found


def _search_few(index: ExactIndex, query_ND: Tensor, k: int, ids_NK: Tensor, scores_NK: Tensor) -> None:
    """The same by scoring every key: of few queries, what goes before bounds takes longer."""
    scores, query_QD = TrueScores(index.keys, index.metric, query_ND), query_ND.numpy()
    best_ids_QC: Array = np.empty((len(query_ND), 0), np.int64)
    best_QC: Array = np.empty((len(query_ND), 0), np.float32)

    def scored(part: slice) -> tuple[Array, Array]:
        keys_MD = scores.rows(part)
        out_QM = np.empty((len(query_QD), len(keys_MD)), np.float32)
        score_all(query_QD, keys_MD, scores.by_distance, out_QM)
        rows_M = np.arange(part.start, part.stop)
        dead_M = np.isin(rows_M, index.deleted) if len(index.deleted) else None
        return (rows_M, out_QM) if dead_M is None else (rows_M[~dead_M], out_QM[:, ~dead_M])

    blocks, ahead = _slices(len(index.keys), _block_rows(index.dim)), 8 * torch.get_num_threads()
    for first in range(0, len(blocks), ahead):
        parts = list(map_in_threads(scored, blocks[first : first + ahead]))
        rows_M = np.concatenate([rows for rows, _ in parts])
        # Lower rows come first, as those of equals have to.
        best_QC = np.concatenate([best_QC, *(each for _, each in parts)], 1)
        best_ids_QC = np.concatenate([best_ids_QC, np.broadcast_to(rows_M, (len(query_QD), len(rows_M)))], 1)
        place_QC = argsort_descending(best_QC, k)
        best_QC = np.take_along_axis(best_QC, place_QC, 1)
        best_ids_QC = np.take_along_axis(best_ids_QC, place_QC, 1)
    ids_NK[:], scores_NK[:] = torch.from_numpy(best_ids_QC), torch.from_numpy(best_QC)


class _Search:
    """One bulk of queries against all keys."""

    def __init__(self, index: ExactIndex, query_ND: Tensor, k: int, *, guess: bool = True) -> None:
        self._index, self._k, self._guess = index, k, guess
        self.keys, self.metric, self.deleted, self.query_ND = index.keys, index.metric, index.deleted, query_ND
        rows = _block_rows(index.dim)
        self.blocks = _slices(len(self.keys), rows)
        self.tiles = _slices(len(self.keys), max(1, _TILE_BYTES // (4 * max(1, index.dim))))
        products = index.products_for(query_ND, k)
        as_chosen = products == index.chosen_products
        self.is_streamed = self.keys.exceeds_ram or (as_chosen and index.has_wide_bounds(query_ND, k))
        self._kept = index.keeper.kept(products, query_ND)
        given = (query_ND, index.sample, products)
        rounding = self._kept.rounding if self._kept is not None else None
        self.queries = RoundedQueries(*given, by_distance=self.metric is Metric.L2, rounding=rounding)
        if self._kept is None:
            self._kept = index.keeper.begin(self.queries.rounding)
        # As many groups for each thread, so that none waits for the others.
        threads, side = torch.get_num_threads(), max(1, products.tile_rows)
        count = -(-len(query_ND) // max(1, _GROUP_SCORES // rows))
        size = max(1, -(-len(query_ND) // (-(-count // threads) * threads)))
        size = -(-size // side) * side
        self.scores = TrueScores(self.keys, self.metric, query_ND)
        self.groups = [self._group(part, k, rows) for part in _slices(len(query_ND), size)]
        self._buffer = ThreadBuffer(size * rows, products.raw_dtype)

    def _group(self, part: slice, k: int, block_rows: int) -> CandidateGroup:
        if self.is_streamed:
            return StreamedGroup(part, k, self.queries, self.scores, block_rows)
        return CandidateGroup(part, k, self.queries, self.scores)

    def run(self, ids_NK: Tensor, scores_NK: Tensor) -> None:
        """Write the k best rows and their scores."""
        expects = self._guess and self._expect()
        ahead = 2 * torch.get_num_threads()
        old: list[KeyBlock | None] = [None] * ahead
        with ReadAhead(self.keys, self.blocks) as reader:
            for first in range(0, len(self.blocks), ahead):
                rows = self.blocks[first : first + ahead]
                keys = [(number, reader.block(number), old[number - first]) for number, _ in enumerate(rows, first)]
                blocks = list(zip(rows, map_in_threads(self._block, keys)))
                run_in_threads(functools.partial(self._scan, blocks), self.groups)
                old[: len(blocks)] = [block for _, (block, _) in blocks]
        if not self.is_streamed:
            # First the k of each query that promise most: what they truly reach spares many of the others.
            run_in_threads(lambda group: group.select_first(), self.groups)
        disappointed = np.concatenate([group.disappointed() for group in self.groups])
        if not self.is_streamed:
            run_in_threads(self._score, self.tiles)
            run_in_threads(lambda group: group.select_remaining(), self.groups)
            run_in_threads(self._score, self.tiles)
        run_in_threads(lambda group: group.write_best(ids_NK, scores_NK), self.groups)
        if len(disappointed) and expects:
            again = torch.from_numpy(disappointed)
            search = functools.partial(_run, self._index, self.query_ND[again], self._k, guess=False)
            _write_rows(again, ids_NK, scores_NK, search)

    def _expect(self) -> bool:
        """Let groups begin with a threshold: of the keys that go by before there is one, all would be candidates.

        Returns: False where a sample tells too little.
        """
        sample_MD = self._index.sample
        expected = self._k * len(sample_MD) / len(self.keys)
        # Keys of a text that follow each other are alike, so that a sample tells less than one drawn by chance does. Of
        # queries that would wait for a second pass over a disk, too few are found for hardly any.
        surely = 7.0 if self.keys.exceeds_ram else 6.0
        rank = math.ceil(expected + surely * math.sqrt(expected) + surely)
        if len(sample_MD) * 8 > len(self.keys) or rank > len(sample_MD) // 4:
            return False
        whole = self._kept.block(SAMPLE) if self._kept is not None else None
        if whole is None:
            whole = self.queries.block(sample_MD)
            if self._kept is not None:
                self._kept.keep(SAMPLE, whole)
        run_in_threads(lambda group: group.expect(whole, rank, self._buffer), self.groups)
        return True

    def _block(self, keys: tuple[int, Tensor, KeyBlock | None]) -> tuple[KeyBlock, Array | None]:
        """A block as it is multiplied, and its keys as they are scored if that is done while they pass by."""
        number, keys_MD, old = keys
        kept = self._kept.block(number) if self._kept is not None else None
        if kept is not None and not self.is_streamed:
            return kept, None
        scored_MD = self.scores.prepare(keys_MD)
        block = kept
        if block is None:
            block = self.queries.block(scored_MD, old if self._kept is None else None)
            rows = self.blocks[number]
            first, past = np.searchsorted(self.deleted, (rows.start, rows.stop))
            block.drop(self.deleted[first:past] - rows.start)
            if self._kept is not None:
                self._kept.keep(number, block)
        return block, scored_MD if self.is_streamed else None

    def _scan(self, blocks: list[tuple[slice, tuple[KeyBlock, Array | None]]], group: CandidateGroup) -> None:
        for rows, (block, scored_MD) in blocks:
            group.take(block, rows.start, self._buffer, scored_MD)

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

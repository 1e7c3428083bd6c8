"""faiss indexes. This is the only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.disk import replacing
from fairseq.memory.files import Array, read_json
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.bulk_search import bulk_search
from fairseq.memory.index.low_precision import Int8Keys, Int8Queries
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric, Neighbors

logger = logging.getLogger(__name__)

_MIN_QUERIES_PER_LIST = 16  # decoding a key costs about as much as ten of its distances
_CACHE_BYTES = 2 << 30  # lists are kept decoded up to this size, so that the next bulk finds them ready
# A float32 inner product is off by a few units in the seventh place of the squared lengths that go into it.
_ROUNDING = 5e-7


@functools.cache
def _faiss() -> Any:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells at INFO which processor it found
    import faiss

    return faiss


def pair_scores_in_place(metric: Metric, query_ND: Tensor, keys: Array, ids_NK: Tensor) -> Tensor:
    """Similarity (L2 or inner product) of each query with its own rows of float32 ``keys``; -inf where the id is -1.

    The rows are read where they are, in a memory map too; torch would copy them first.
    """
    faiss = _faiss()
    function = {Metric.L2: faiss.fvec_L2sqr_by_idx, Metric.IP: faiss.fvec_inner_products_by_idx}[metric]
    ids_NK = ids_NK.contiguous()
    scores_NK = torch.full(ids_NK.shape, torch.inf if metric is Metric.L2 else -torch.inf)
    count, k = ids_NK.shape
    pointers = (faiss.swig_ptr(a) for a in (scores_NK.numpy(), query_ND.contiguous().numpy(), keys, ids_NK.numpy()))
    if count and k and len(keys):
        function(*pointers, query_ND.shape[1], count, k)
    return scores_NK.neg_() if metric is Metric.L2 else scores_NK.masked_fill_(ids_NK < 0, -torch.inf)


def find_index(name: str | Path, metric: Metric) -> Path:
    """The file that a user's NAME means: NAME itself, or NAME with the metric as its ending.

    Raises: ValueError when there is none, naming one of another metric if that is there.
    """
    path = Path(name)
    if path.is_file():
        return path
    for each in Metric:
        other = Path(f"{name}.{each.value}")
        if other.is_file() and each is metric:
            return other
    for each in Metric:
        if Path(f"{name}.{each.value}").is_file():
            raise ValueError(
                f"no index {name}.{metric.value}; {name}.{each.value} is there: give --faiss-metric-type {each.value}, "
                f"or build one with --dist {metric.value}"
            )
    raise ValueError(f"no index at {str(name)!r} (nor {name}.{metric.value}); build it with build_dstore.py")


class FaissIndex:
    """A faiss index whose scores are turned to *higher is closer* and whose results are checked."""

    def __init__(self, index: Any, metric: Metric, name: str = "index") -> None:
        """Wrap an index that faiss made.

        Raises: ValueError when it measures by another metric than ``metric``.
        """
        faiss = _faiss()
        expected = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        if index.metric_type != expected:
            has = "l2" if index.metric_type == faiss.METRIC_L2 else "ip"
            raise ValueError(f"{name} measures by {has}, --faiss-metric-type says {metric.value}; give {has}")
        self.inner, self.metric, self.name = index, metric, name
        self._lists: DecodedLists | None = None

    @classmethod
    def open(cls, name: str | Path, metric: Metric, *, mapped: bool = False) -> FaissIndex:
        """Read an index file.

        Args:
            mapped: leave the lists on disk and read them as they are visited.
        Raises: ValueError when it is missing, damaged or of another metric.
        """
        faiss = _faiss()
        path = find_index(name, metric)
        ending = path.suffix[1:]
        if ending in [each.value for each in Metric] and ending != metric.value:
            raise ValueError(f"{path} is of metric {ending}, --faiss-metric-type says {metric.value}; give {ending}")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a whole faiss index: cut short, damaged or another kind of file; rebuild it with "
                "build_dstore.py"
            ) from error
        return cls(index, metric, str(path))

    def made_of(self) -> str | None:
        """Digest of the store the index was built over, where the file beside it tells."""
        about = Path(self.name + ".json")
        signature = read_json(about).get("signature", {}) if about.is_file() else {}
        digest: str | None = signature.get("store", {}).get("digest")
        return digest

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return int(self.inner.d)

    def __len__(self) -> int:
        return int(self.inner.ntotal)

    def __str__(self) -> str:
        return f"{self.name}: {len(self)} rows of width {self.dim}, {self.metric.value}"

    def set_probe(self, probe: int) -> None:
        """How many lists a search visits; more than there are means all. An index without lists has nothing to set."""
        if probe < 1:
            raise ValueError(f"--probe must be at least 1, got {probe}")
        if hasattr(self.inner, "nprobe"):
            self.inner.nprobe = min(probe, self.inner.nlist)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query, best first; ids of -1 where the visited lists held fewer."""
        check_k(k, len(self))
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu()
        query_ND = normalized(query_ND) if self.metric is Metric.COS else query_ND
        if DecodedLists.pays_for(self.inner, len(query_ND)):
            return self._checked(*self._search_in_bulk(query_ND, k))
        return self._checked(*self._search(query_ND, k))

    def _search(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows and scores as faiss finds them."""
        distances_NK, ids_NK = self.inner.search(np.ascontiguousarray(query_ND.numpy()), k)
        scores_NK = torch.from_numpy(distances_NK)
        return torch.from_numpy(ids_NK), scores_NK.neg_() if self.metric is Metric.L2 else scores_NK

    def _search_in_bulk(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same rows by matrix products; queries whose k-th neighbour is in doubt by rounding are left to faiss."""
        if self._lists is None:
            self._lists = DecodedLists(self.inner)
        found = bulk_search(self._lists, query_ND, k + 1, low_precision=has_fast_int8())
        ids_NK, scores_NK = found[0][:, :k].contiguous(), found[1][:, :k].contiguous()
        query_size_N = query_ND.square().sum(1)
        doubt_N = _ROUNDING * (query_size_N + self._lists.key_size)
        close = ((found[1][:, k - 1] - found[1][:, k]) < doubt_N).nonzero()[:, 0]
        if self.metric is Metric.L2:
            scores_NK = (2.0 * scores_NK - query_size_N[:, None]).clamp_(max=0.0)
        if len(close):
            ids_NK[close], scores_NK[close] = self._search(query_ND[close], k)
        logger.debug("%d of %d queries searched by faiss itself", len(close), len(query_ND))
        return ids_NK, scores_NK

    def _checked(self, ids_NK: Tensor, scores_NK: Tensor) -> Neighbors:
        """Missing rows masked, best first. Raises: ValueError for rows that do not exist."""
        if ids_NK.numel() and int(ids_NK.max()) >= len(self):
            raise ValueError(f"{self.name} returned row {int(ids_NK.max())} of {len(self)}; it is damaged: rebuild it")
        missing_NK = ids_NK < 0
        ids_NK = ids_NK.masked_fill(missing_NK, -1)
        scores_NK = scores_NK.masked_fill(missing_NK, -torch.inf)
        if (scores_NK[:, 1:] > scores_NK[:, :-1]).any():  # seen with GPU indexes at large k
            order_NK = scores_NK.argsort(dim=1, descending=True, stable=True)
            ids_NK, scores_NK = ids_NK.gather(1, order_NK), scores_NK.gather(1, order_NK)
        return Neighbors(ids_NK, scores_NK)


class DecodedLists:
    """The lists of an index of product-quantized keys, decoded on demand (see ``bulk_search``)."""

    def __init__(self, index: Any) -> None:
        """Take a faiss IndexIVFPQ."""
        faiss = _faiss()
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
        return torch.from_numpy(_faiss().rev_swig_ptr(lists.get_ids(number), size))

    def decoded(self, number: int) -> Tensor:
        """Keys of one list, for L2 with minus half their squared length behind them."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        lists, width = self._index.invlists, self._index.d
        size = lists.list_size(number)
        codes = torch.from_numpy(_faiss().rev_swig_ptr(lists.get_codes(number), size * lists.code_size))
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
        _faiss().omp_set_num_threads(1)


def _pairwise(function: str, left_ND: Tensor, row_H: Tensor, right_MD: Tensor | Array, col_H: Tensor) -> Tensor:
    """Apply one of faiss's functions of pairs of rows; it reads them in place, where torch would copy them first."""
    faiss = _faiss()
    out_H = torch.empty(len(row_H))
    right_MD = right_MD.contiguous().numpy() if isinstance(right_MD, Tensor) else np.ascontiguousarray(right_MD)
    arrays = [t.contiguous().numpy() for t in (left_ND, row_H, col_H)]
    left, row, col, right = map(faiss.swig_ptr, (*arrays, right_MD))
    getattr(faiss, function)(left_ND.shape[1], len(row_H), left, row, right, col, faiss.swig_ptr(out_H.numpy()))
    return out_H


@functools.cache
def has_fast_int8() -> bool:
    """Whether the processor multiplies 8-bit integers faster than floats. Not measured: timing must not decide bits."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = file.read().split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(words) and hasattr(torch, "_int_mm")


class FaissBuilder:
    """An index in the making: trained on a sample, then filled with codes in the order of the rows."""

    def __init__(self, index: Any, cosine: bool) -> None:
        """Wrap a faiss index; ``cosine`` scales every key to length one first."""
        self._index, self._cosine = index, cosine

    @classmethod
    def new(cls, factory: str, dim: int, metric: Metric, seed: int) -> FaissBuilder:
        """An empty, untrained index of a faiss factory string."""
        faiss = _faiss()
        index = faiss.index_factory(
            dim, factory, faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        )
        for part in (index, getattr(index, "pq", index)):
            if hasattr(part, "cp"):
                part.cp.seed = seed
        return cls(index, metric is Metric.COS)

    @classmethod
    def load(cls, path: Path, cosine: bool) -> FaissBuilder:
        """Read what ``save`` wrote."""
        return cls(_faiss().read_index(str(path)), cosine)

    def save(self, path: Path) -> None:
        """Write the index so that the name stands for a whole file or none."""
        # Through Python's file: faiss's own writer does not notice when the last bytes find no room (faiss 1.15).
        with replacing(path) as aside, open(aside, "wb") as file:
            _faiss().write_index(self._index, _faiss().PyCallbackIOWriter(file.write))
            file.flush()
            os.fsync(file.fileno())

    @property
    def code_bytes(self) -> int:
        """Bytes of one encoded row."""
        return int(self._index.sa_code_size())

    @property
    def num_rows(self) -> int:
        """Rows in the index."""
        return int(self._index.ntotal)

    def train(self, keys_ND: Array) -> None:
        """Learn lists and compression from a sample."""
        self._index.train(self._prepared(keys_ND))

    def encode(self, keys_ND: Array) -> Array:
        """Codes of some keys, (N, code_bytes) uint8."""
        codes: Array = self._index.sa_encode(self._prepared(keys_ND))
        return codes

    def add_codes(self, codes: Array) -> None:
        """Append rows given their codes."""
        self._index.add_sa_codes(codes)

    def index(self, metric: Metric, name: str) -> FaissIndex:
        """What has been added so far, to be searched."""
        return FaissIndex(self._index, metric, name)

    def set_probe(self, probe: int) -> None:
        """Lists a search visits by default."""
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = min(probe, self._index.nlist)

    def _prepared(self, keys_ND: Array) -> Array:
        keys = np.ascontiguousarray(keys_ND, dtype=np.float32)
        return normalized(torch.from_numpy(keys)).numpy() if self._cosine else keys

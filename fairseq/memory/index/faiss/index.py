"""faiss indexes: opened, searched, and their results checked."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.faiss.file_marks import INDEX, WAY_OUT, check_marks
from fairseq.memory.index.faiss.gpu import GpuSearch
from fairseq.memory.index.faiss.lists_file import check_lists_file
from fairseq.memory.index.faiss.strategy import IndexTraits, SearchStrategy, choose_strategy
from fairseq.memory.index.faiss_library import (
    SwigIndex,
    bulk_queries_per_list,
    faiss_library,
    faiss_threads,
    has_byte_codes,
    has_codes_in_ram,
    search_faiss,
)
from fairseq.memory.index.lists.adc_search import AdcSearch
from fairseq.memory.index.lists.bulk_search import TakePart, search_in_bulk, search_in_parts
from fairseq.memory.index.lists.decoded_lists import KEPT_BYTES, DecodedLists, fits_decoded
from fairseq.memory.index.lists.pq_rescoring import row_scorer
from fairseq.memory.index.ops import products
from fairseq.memory.index.ops.merging import alive_of
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.records import read_record

logger = logging.getLogger(__name__)

_LEAST_IN_VIEW = 16  # faiss's own default for graphs
_NONE = np.empty(0, np.int64)
# Kinds without lists that skip the rows of a selector (tested); others ignore it or raise.
_SELECTING = {"IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexScalarQuantizer", "IndexRaBitQ"}


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
    """A faiss index whose scores are *higher is closer* and whose results are checked. ``build_index`` makes the file.

    ```python
    index = FaissIndex.open("store.index", Metric.L2)
    index.set_probe(4)  # lists per query
    index.search(query_ND, k=4).scores_NK
    ```
    """

    def __init__(self, index: SwigIndex, metric: Metric, name: str = "index", *, deleted: Array | None = None) -> None:
        """Wrap an index that faiss made.

        Args:
            index: a faiss index.
            metric: its metric; for ``cos`` an inner-product index over keys of length one.
            name: shown in messages.
            deleted: int64 rows that are never found; None for none.
        Raises: ValueError when the index has another metric than ``metric``.
        """
        faiss = faiss_library()
        expected = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        if index.metric_type != expected:
            has = "l2" if index.metric_type == faiss.METRIC_L2 else "ip"
            raise ValueError(
                f"{name} uses metric {has} but --faiss-metric-type is {metric.value}; pass --faiss-metric-type {has}"
            )
        self.inner, self.metric, self.name = index, metric, name
        self.deleted: Array = np.unique(np.asarray([] if deleted is None else deleted, dtype=np.int64))
        self.kept_bytes = KEPT_BYTES
        """Limit on the decoded lists that a search in bulk keeps for the next one; set it before the first search."""
        self._alive: Array | None = None
        self._by_gpu: GpuSearch | None = None
        self._lists: DecodedLists | None = None
        self._tables: AdcSearch | None = None
        self._one: AdcSearch | None = None
        self._one_key: tuple[int, int, int, bool] | None = None
        self._rows: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads the lists of its own index: those of this one may be gone, or of another process."""
        return self.__dict__ | dict.fromkeys(("_lists", "_tables", "_one", "_one_key", "_rows"))

    @classmethod
    def open(
        cls, name: str | Path, metric: Metric, *, mapped: bool = False, deleted: Array | None = None
    ) -> FaissIndex:
        """Read an index file.

        Args:
            name: the file, with or without the metric as its ending.
            metric: metric the index was built with.
            mapped: leave the lists on disk and read them as they are probed; lists in a file of their own always are.
            deleted: rows of the store that must not be found.
        Raises: ValueError when it is missing, damaged, of another metric, or its files do not belong together.
        """
        faiss = faiss_library()
        path = find_index(name, metric)
        ending = path.suffix[1:]
        if ending in [each.value for each in Metric] and ending != metric.value:
            raise ValueError(
                f"{path} uses metric {ending} but --faiss-metric-type is {metric.value}; "
                f"pass --faiss-metric-type {ending}"
            )
        metadata = index_metadata(path)
        if metadata.get("metric", metric.value) != metric.value:
            has = metadata["metric"]
            raise ValueError(
                f"{path} uses metric {has} but --faiss-metric-type is {metric.value}; pass --faiss-metric-type {has}"
            )
        check_marks(path, metadata)
        mapped = not check_lists_file(path, metadata) and mapped
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | (faiss.IO_FLAG_MMAP if mapped else 0)
        try:
            index = faiss.read_index(str(path), flags)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a whole faiss index: cut short, damaged or another kind of file; rebuild it with "
                "build_dstore.py"
            ) from error
        dropped = np.union1d(
            _NONE if deleted is None else deleted, np.asarray(metadata.get("left_out", _NONE), np.int64)
        )
        if len(dropped) and dropped.max() >= index.ntotal:
            dropped = dropped[dropped < index.ntotal]  # rows it does not hold: a comparison of sizes will report them
        return cls(index, metric, str(path), deleted=dropped)

    def fingerprint(self) -> str | None:
        """Digest of the store the index was built over; None if the file beside the index does not say."""
        digest: str | None = index_metadata(Path(self.name)).get("signature", {}).get("store", {}).get("digest")
        return digest

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return int(self.inner.d)

    @property
    def num_alive(self) -> int:
        """Number of rows that can be found."""
        return len(self) - len(self.deleted)

    streams_keys = False

    def bulk_pays(self, num_queries: int) -> bool:
        """True if this many queries cost less in one search than one by one."""
        return choose_strategy(replace(self._traits(), on_gpu=False), num_queries, k=1).decodes_lists

    def __len__(self) -> int:
        return int(self.inner.ntotal)

    def __str__(self) -> str:
        return f"{self.name}: {len(self)} rows of width {self.dim}, {self.metric.value}"

    def set_probe(self, probe: int) -> None:
        """Set the lists probed per query; more than exist means all.

        A graph keeps this many rows in view, at least 16. Other kinds have nothing to set.
        """
        if probe < 1:
            raise ValueError(f"--probe must be at least 1, got {probe}")
        lists = lists_of(self.inner)
        if lists is not None:
            lists.nprobe = min(probe, lists.nlist)
        elif hasattr(self.inner, "hnsw"):
            self.inner.hnsw.efSearch = max(_LEAST_IN_VIEW, probe)

    def use_gpus(self) -> None:
        """Search on the GPUs that faiss sees; logs one line if there is none or the kind is not supported."""
        self._by_gpu = GpuSearch.of(self.inner, self.name)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query (N, D), best first; ids are -1 where the probed lists held fewer.

        Raises: ValueError if k exceeds the rows that are not deleted, or the width does not fit.
        """
        query_ND = self._as_searched(query_ND, k)
        traits = self._traits()
        strategy = choose_strategy(traits, len(query_ND), k)
        if strategy is SearchStrategy.GPU:
            try:
                return self._checked(*self._search_on_gpus(query_ND, k))
            except RuntimeError as error:  # codes of a size that GPUs lack, or no memory left
                why = str(error).rpartition("Error: ")[2]
                logger.warning("%s is searched on the CPU from now on: the GPU cannot (%s)", self.name, why)
                self._by_gpu = None
                strategy = choose_strategy(replace(traits, on_gpu=False), len(query_ND), k)
        if strategy is SearchStrategy.LARGE_K_IN_BULK:
            return self._ordered_by_row(*search_in_bulk(self._decoded_lists(), query_ND, k))
        if strategy is SearchStrategy.LARGE_K_BY_TABLES:
            return self._ordered_by_row(*self._adc_search().search(query_ND, k))
        if strategy is SearchStrategy.LISTS_IN_BULK:
            return self._checked(*search_in_bulk(self._decoded_lists(), query_ND, k, ties_of_faiss=True))
        return self._checked(*self._search_by_faiss(query_ND, k, strategy))

    def search_in_parts(self, query_ND: Tensor, k: int, take: TakePart) -> bool:
        """:meth:`search` that hands over some queries' neighbours at a time, each query's in no order.

        Several threads call ``take`` with the numbers of queries and their neighbours, which it must not keep.

        Returns: False, and nothing was searched, where the index is not searched by parts.
        Raises: as :meth:`search`.
        """
        query_ND = self._as_searched(query_ND, k)
        if choose_strategy(self._traits(), len(query_ND), k) is not SearchStrategy.LARGE_K_IN_BULK:
            return False
        search_in_parts(self._decoded_lists(), query_ND, k, take)
        return True

    def _as_searched(self, query_ND: Tensor, k: int) -> Tensor:
        check_k(k, self.num_alive)
        return self.as_compared(query_ND)

    def as_compared(self, query_ND: Tensor) -> Tensor:
        """Queries as they are compared with keys: float32 on the CPU, for the cosine of length one.

        Raises: ValueError if the width does not fit.
        """
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu()
        return normalized(query_ND) if self.metric is Metric.COS else query_ND

    def search_of_one(self, k: int) -> AdcSearch | None:
        """The search of a single query for ``k`` neighbours, where kernels can call it; None elsewhere."""
        key = int(self.inner.ntotal), getattr(self.inner, "nprobe", 0), k, self._by_gpu is None
        if key != self._one_key:
            by_tables = choose_strategy(self._traits(), 1, k) is SearchStrategy.LARGE_K_BY_TABLES
            self._one_key, self._one = key, self._adc_search() if by_tables else None
        return self._one if self._one is not None and self._one.has_flat_centroids else None

    def _traits(self) -> IndexTraits:
        lists = lists_of(self.inner)
        return IndexTraits(
            num_keys=len(self),
            num_lists=0 if lists is None else lists.nlist,
            num_probed=0 if lists is None else lists.nprobe,
            has_lists=lists is not None,
            # Other keys than product-quantized ones are multiplied by faiss as fast as by float32 products.
            bulk_queries_per_list=bulk_queries_per_list(self.inner, is_kept=fits_decoded(self.inner, self.kept_bytes))
            if products.has_fast_int8() or has_byte_codes(self.inner)
            else 0,
            codes_in_ram=has_codes_in_ram(self.inner),
            on_gpu=self._by_gpu is not None,
        )

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query by their compressed keys, float32 (N, M); -inf for the id -1.

        Raises: ValueError when this kind of index does not give its keys back.
        """
        scores_NM: Tensor = self.row_scorer(self.as_compared(query_ND), ids_NM)
        return scores_NM

    @property
    def row_scorer(self) -> Any:
        """What scores rows for queries of :meth:`as_compared`. Raises: as :meth:`score_rows`."""
        if self._rows is None:
            self._rows = row_scorer(self.inner, by_distance=self.metric is Metric.L2)
        return self._rows

    def _search_by_faiss(self, query_ND: Tensor, k: int, strategy: SearchStrategy) -> tuple[Tensor, Tensor]:
        """Rows and scores as faiss finds them."""
        with faiss_threads(1) if strategy is SearchStrategy.FAISS_ON_ONE_THREAD else nullcontext():
            return self._search_by_faiss_threads(query_ND, k)

    def _search_by_faiss_threads(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        query = np.ascontiguousarray(query_ND.numpy())
        if len(self.deleted) and hasattr(self.inner, "hnsw"):
            return self._search_graph(query, k)
        parameters = self._parameters(k)
        if parameters is not None or not len(self.deleted):
            return self._as_scores(*search_faiss(self.inner, query, k, parameters))
        # A kind that cannot pass over rows: more are asked for until enough of them are alive.
        return alive_of(
            lambda more: self._as_scores(*search_faiss(self.inner, query, more)), self.deleted, k, len(self)
        )

    def _search_graph(self, query: Array, k: int) -> tuple[Tensor, Tensor]:
        """A graph keeps as many more rows in view as are deleted; a query that finds fewer than k looks at more."""
        view = -(-max(k, self.inner.hnsw.efSearch) * len(self) // self.num_alive)
        ids_NK, scores_NK = torch.full((len(query), k), -1), torch.full((len(query), k), -torch.inf)
        open_N = torch.arange(len(query))
        while len(open_N):
            parameters = self._parameters(k, view=min(view, len(self)))
            found = self._as_scores(*search_faiss(self.inner, query[open_N.numpy()], k, parameters))
            ids_NK[open_N], scores_NK[open_N] = found
            if view >= len(self):
                break
            open_N, view = open_N[(found[0] < 0).any(1)], 4 * view
        return ids_NK, scores_NK

    def _as_scores(self, distances_NK: Array, ids_NK: Array) -> tuple[Tensor, Tensor]:
        scores_NK = torch.from_numpy(distances_NK)
        return torch.from_numpy(ids_NK), scores_NK.neg_() if self.metric is Metric.L2 else scores_NK

    def _ordered_by_row(self, ids_NK: Tensor, scores_NK: Tensor) -> Neighbors:
        """Many neighbours, of which equals are in the order of their rows, rather than in the order of faiss."""
        self._check_rows(ids_NK)
        return Neighbors(ids_NK, scores_NK, equals_by_row=True)

    def _adc_search(self) -> AdcSearch:
        if self._tables is None or self._tables.num_keys != len(self):  # it reads the codes where faiss keeps them
            self._tables = AdcSearch(self.inner, self._alive_bits() if len(self.deleted) else None, self.kept_bytes)
        return self._tables

    def _decoded_lists(self) -> DecodedLists:
        if self._lists is None or self._lists.num_keys != len(self):
            self._lists = DecodedLists(
                self.inner, products=products.chosen_tiles(), deleted=self.deleted, kept_bytes=self.kept_bytes
            )
        return self._lists

    def _alive_bits(self) -> Array:
        """A bit for each row, the lowest first: whether it may be found."""
        if self._alive is None or 8 * len(self._alive) < len(self):
            alive = np.ones(-(-len(self) // 8) * 8, bool)
            alive[self.deleted] = False
            self._alive = np.packbits(alive, bitorder="little")
        return self._alive

    def _parameters(self, k: int, view: int = 0) -> Any:
        """Parameters by which faiss skips deleted rows and keeps k in view; None where none are needed, or possible."""
        faiss = faiss_library()
        kind = type(self.inner).__name__
        more: dict[str, Any] = {}
        if len(self.deleted):
            more["sel"] = faiss.IDSelectorBitmap(self._alive_bits())
        lists = lists_of(self.inner)
        if lists is not None:
            if not more or not _takes_selector(self.inner):
                return None
            return faiss.SearchParametersIVF(nprobe=lists.nprobe, **more)
        if hasattr(self.inner, "hnsw"):
            return faiss.SearchParametersHNSW(efSearch=max(k, view, self.inner.hnsw.efSearch), **more)
        return faiss.SearchParameters(**more) if more and kind in _SELECTING else None

    def _search_on_gpus(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        gpus = self._by_gpu
        assert gpus is not None

        def find(more: int) -> tuple[Tensor, Tensor]:
            scores_NK, ids_NK, doubt_N = gpus.search(query_ND, more)
            if len(doubt_N):
                ids_NK[doubt_N], scores_NK[doubt_N] = self._as_scores(
                    *search_faiss(self.inner, np.ascontiguousarray(query_ND[doubt_N].numpy()), more)
                )
            return ids_NK, scores_NK

        return alive_of(find, self.deleted, k, len(self))

    def _check_rows(self, ids_NK: Tensor) -> None:
        if ids_NK.numel() and int(ids_NK.max()) >= len(self):
            raise ValueError(f"{self.name} returned row {int(ids_NK.max())} of {len(self)}; it is damaged: rebuild it")

    def _checked(self, ids_NK: Tensor, scores_NK: Tensor) -> Neighbors:
        """Missing rows masked, best first. Raises: ValueError for rows that do not exist or come twice."""
        self._check_rows(ids_NK)
        missing_NK = (ids_NK < 0) | scores_NK.isnan()
        if missing_NK.any():
            ids_NK = ids_NK.masked_fill(missing_NK, -1)
            scores_NK = scores_NK.masked_fill(missing_NK, -torch.inf)
        if (scores_NK[:, 1:] > scores_NK[:, :-1]).any():  # seen with GPU indexes at large k
            order_NK = scores_NK.argsort(dim=1, descending=True, stable=True)
            ids_NK, scores_NK = ids_NK.gather(1, order_NK), scores_NK.gather(1, order_NK)
        return Neighbors(ids_NK, scores_NK)


def index_metadata(path: Path) -> dict[str, Any]:
    """The metadata file beside an index; empty where there is none."""
    metadata = Path(f"{path}.json")
    return read_record(metadata, INDEX, WAY_OUT) if metadata.is_file() else {}


def lists_of(index: SwigIndex) -> Any:
    """The part of a faiss index that has lists; None for one without."""
    faiss = faiss_library()
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


def _takes_selector(index: SwigIndex) -> bool:
    """True if an index with lists can skip rows; those that refine the results of another one cannot."""
    faiss = faiss_library()
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    return isinstance(inner, faiss.IndexIVF) and not isinstance(inner, faiss.IndexIVFPQR)

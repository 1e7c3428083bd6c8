"""faiss indexes: opened, searched, and their results checked."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.files import Array, read_json
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.bulk_search import bulk_search
from fairseq.memory.index.coded_rows import row_scorer
from fairseq.memory.index.decoded_lists import DecodedLists
from fairseq.memory.index.faiss_library import faiss_library
from fairseq.memory.index.wide_search import is_wide, wide_search
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric, Neighbors

logger = logging.getLogger(__name__)

# A float32 inner product is off by a few units in the seventh place of the squared lengths that go into it.
_ROUNDING = 5e-7


def pair_scores_in_place(metric: Metric, query_ND: Tensor, keys: Array, ids_NK: Tensor) -> Tensor:
    """Similarity (L2 or inner product) of each query with its own rows of float32 ``keys``; -inf where the id is -1.

    The rows are read where they are, in a memory map too; torch would copy them first.
    """
    faiss = faiss_library()
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
        faiss = faiss_library()
        expected = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        if index.metric_type != expected:
            has = "l2" if index.metric_type == faiss.METRIC_L2 else "ip"
            raise ValueError(f"{name} measures by {has}, --faiss-metric-type says {metric.value}; give {has}")
        self.inner, self.metric, self.name = index, metric, name
        self._lists: DecodedLists | None = None
        self._rows: Any = None

    @classmethod
    def open(cls, name: str | Path, metric: Metric, *, mapped: bool = False) -> FaissIndex:
        """Read an index file.

        Args:
            mapped: leave the lists on disk and read them as they are visited.
        Raises: ValueError when it is missing, damaged or of another metric.
        """
        faiss = faiss_library()
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

    def pair_scores(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Score of each query with some rows by their compressed keys, (N, M), as a search gives it; -inf for -1.

        Raises: ValueError when this kind of index does not give its keys back.
        """
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu()
        if self._rows is None:
            self._rows = row_scorer(self.inner, by_distance=self.metric is Metric.L2)
        scores_NM: Tensor = self._rows(normalized(query_ND) if self.metric is Metric.COS else query_ND, ids_NM)
        return scores_NM

    def _search(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows and scores as faiss finds them."""
        distances_NK, ids_NK = self.inner.search(np.ascontiguousarray(query_ND.numpy()), k)
        scores_NK = torch.from_numpy(distances_NK)
        return torch.from_numpy(ids_NK), scores_NK.neg_() if self.metric is Metric.L2 else scores_NK

    def _search_in_bulk(self, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same rows by matrix products; queries whose k-th neighbour is in doubt by rounding are left to faiss."""
        if self._lists is None:
            self._lists = DecodedLists(self.inner)
        if is_wide(k, len(self), self.inner.nlist):
            found = wide_search(self._lists, query_ND, k + 1)
        else:
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


@functools.cache
def has_fast_int8() -> bool:
    """Whether the processor multiplies 8-bit integers faster than floats. Not measured: timing must not decide bits."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = file.read().split()
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(words) and hasattr(torch, "_int_mm")

"""faiss indexes. This is the only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.files import Array
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric, Neighbors

logger = logging.getLogger(__name__)


def _faiss() -> Any:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells at INFO which processor it found
    import faiss

    return faiss


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

    @classmethod
    def open(cls, name: str | Path, metric: Metric) -> FaissIndex:
        """Read an index file. Raises: ValueError when it is missing, damaged or of another metric."""
        path = find_index(name, metric)
        ending = path.suffix[1:]
        if ending in [each.value for each in Metric] and ending != metric.value:
            raise ValueError(f"{path} is of metric {ending}, --faiss-metric-type says {metric.value}; give {ending}")
        try:
            index = _faiss().read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is not a whole faiss index: {str(error).splitlines()[-1]}; rebuild it") from None
        return cls(index, metric, str(path))

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
        distances_NK, ids_NK = self.inner.search(np.ascontiguousarray(query_ND.numpy()), k)
        return self._checked(torch.from_numpy(ids_NK), torch.from_numpy(distances_NK))

    def _checked(self, ids_NK: Tensor, distances_NK: Tensor) -> Neighbors:
        """Scores with our sign, missing ones masked, best first. Raises: ValueError for rows that do not exist."""
        if ids_NK.numel() and int(ids_NK.max()) >= len(self):
            raise ValueError(f"{self.name} returned row {int(ids_NK.max())} of {len(self)}; it is damaged: rebuild it")
        scores_NK = distances_NK.neg() if self.metric is Metric.L2 else distances_NK
        missing_NK = ids_NK < 0
        ids_NK = ids_NK.masked_fill(missing_NK, -1)
        scores_NK = scores_NK.masked_fill(missing_NK, -torch.inf)
        if (scores_NK[:, 1:] > scores_NK[:, :-1]).any():  # seen with GPU indexes at large k
            order_NK = scores_NK.argsort(dim=1, descending=True, stable=True)
            ids_NK, scores_NK = ids_NK.gather(1, order_NK), scores_NK.gather(1, order_NK)
        return Neighbors(ids_NK, scores_NK)


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
        aside = path.with_name(path.name + ".tmp")
        _faiss().write_index(self._index, str(aside))
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)

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

    def set_probe(self, probe: int) -> None:
        """Lists a search visits by default."""
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = min(probe, self._index.nlist)

    def _prepared(self, keys_ND: Array) -> Array:
        keys = np.ascontiguousarray(keys_ND, dtype=np.float32)
        return normalized(torch.from_numpy(keys)).numpy() if self._cosine else keys

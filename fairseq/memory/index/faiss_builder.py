"""A faiss index in the making."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.disk import replacing
from fairseq.memory.files import Array
from fairseq.memory.index.faiss_library import faiss_library
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric


class FaissBuilder:
    """An index in the making: trained on a sample, then filled with codes in the order of the rows."""

    def __init__(self, index: Any, cosine: bool) -> None:
        """Wrap a faiss index; ``cosine`` scales every key to length one first."""
        self._index, self._cosine = index, cosine

    @classmethod
    def new(cls, factory: str, dim: int, metric: Metric, seed: int) -> FaissBuilder:
        """An empty, untrained index of a faiss factory string."""
        faiss = faiss_library()
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
        return cls(faiss_library().read_index(str(path)), cosine)

    def save(self, path: Path) -> None:
        """Write the index so that the name stands for a whole file or none."""
        # Through Python's file: faiss's own writer does not notice when the last bytes find no room (faiss 1.15).
        with replacing(path) as aside, open(aside, "wb") as file:
            faiss_library().write_index(self._index, faiss_library().PyCallbackIOWriter(file.write))
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

    def set_probe(self, probe: int) -> None:
        """Lists a search visits by default."""
        if hasattr(self._index, "nprobe"):
            self._index.nprobe = min(probe, self._index.nlist)

    def _prepared(self, keys_ND: Array) -> Array:
        keys = np.ascontiguousarray(keys_ND, dtype=np.float32)
        return normalized(torch.from_numpy(keys)).numpy() if self._cosine else keys

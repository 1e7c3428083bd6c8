"""A faiss index in the making: trained on a sample, then filled in the order of the rows.

Most kinds turn a key into a few bytes by themselves: such codes can be made apart, in a file, and be put into the index
afterwards (``encode``, ``add_codes``). A graph cannot: keys are added to it (``add``).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, faiss_threads
from fairseq.memory.index.kmeans.kmeans import Assigner, kmeans
from fairseq.memory.index.ops.products import has_fast_int8
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Array, Metric
from fairseq.runtime.atomic_files import replacing

logger = logging.getLogger(__name__)

_CODED = {
    *("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ", "IndexLSH", "IndexRaBitQ"),
    *("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer", "IndexIVFRaBitQ"),
}
# Rows of these are not numbered as they come, or all of them must come at once.
_UNFIT = {
    *("IndexIDMap", "IndexIDMap2", "IndexNSGFlat", "IndexNSGPQ", "IndexNSGSQ", "IndexNNDescentFlat"),
    *("IndexSplitVectors", "IndexShards", "IndexReplicas"),
}
# 4-bit codes in the order in which faiss scans them fast are made as ordinary ones, and put in order at the end.
_FAST_SCAN = re.compile(r"PQ(\d+)x4fs(r?)(?:_(\d+))?(?=,|$)")
_BLOCK_SIZE = 32
_DEEPEST = 4  # indexes within indexes
_ROWS_PER_CENTROID = 39  # faiss's own bound


class FaissBuilder:
    """An index that is trained, filled and saved."""

    def __init__(self, index: SwigIndex, factory: str, metric: Metric, seed: int, device: str = "cpu") -> None:
        """Wrap a faiss index; use ``new`` or ``load``."""
        faiss = faiss_library()
        self._index, self._factory, self._metric, self._seed, self._device = index, factory, metric, seed, device
        base: Any = index
        self._base, self._chain = base, []
        if isinstance(index, faiss.IndexPreTransform):
            self._base = faiss.downcast_index(index.index)
            self._chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        self._assigner: Assigner | None = None

    @classmethod
    def new(cls, factory: str, dim: int, metric: Metric, seed: int, device: str = "cpu") -> FaissBuilder:
        """An empty, untrained index of a faiss factory string.

        Args:
            device: where lists are made and keys sorted into them.
        Raises: ValueError when faiss has no such index, or it cannot be filled row by row.
        """
        faiss = faiss_library()
        fast = _FAST_SCAN.search(factory) if "IVF" in factory else None
        inner = _FAST_SCAN.sub(r"PQ\1x4np", factory) if fast else factory
        try:
            index = faiss.index_factory(
                dim, inner, faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
            )
        except RuntimeError as error:
            why = str(error).rpartition("Error: ")[2] or str(error)
            raise ValueError(
                f"faiss cannot make an index {factory!r} over keys of width {dim} with metric {metric.value} "
                f"({' '.join(why.split())}); see docs/indexes.md"
            ) from None
        made = cls(index, factory, metric, seed, device)
        kind = type(made._base).__name__
        if kind in _UNFIT:
            raise ValueError(f"--index {factory}: a {kind} cannot be filled row by row; HNSW32 is a graph that can")
        for part in (made._base, getattr(made._base, "pq", made._base)):
            if hasattr(part, "cp"):
                part.cp.seed = seed
        if hasattr(made._base, "do_polysemous_training"):  # as "np" says it; see INDEXES
            made._base.do_polysemous_training = False
        if fast:
            made._base.by_residual = bool(fast[2])
        _silence(index)
        return made

    @classmethod
    def load(cls, path: Path, factory: str, metric: Metric, seed: int, device: str = "cpu") -> FaissBuilder:
        """Read what ``save`` wrote of an index that is not finished. Raises: ValueError when it is damaged."""
        try:
            return cls(faiss_library().read_index(str(path)), factory, metric, seed, device)
        except RuntimeError:
            raise ValueError(f"{path} is damaged") from None

    def save(self, path: Path) -> None:
        """Write the index as it is, so that the name stands for a whole file or none."""
        write_index(self._index, path)

    def save_finished(self, path: Path) -> None:
        """Write the index as it is searched."""
        write_index(self._finished(), path)

    @property
    def by_codes(self) -> bool:
        """True if rows can be encoded separately and added as codes."""
        return type(self._base).__name__ in _CODED

    @property
    def copies(self) -> bool:
        """True if a key's code is the key itself, so that encoding separately saves nothing."""
        return not self._chain and type(self._base).__name__.startswith("IndexFlat")

    @property
    def code_bytes(self) -> int:
        """Bytes of one encoded row."""
        return int(self._base.sa_code_size())

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes in the finished index, roughly."""
        if self.by_codes:
            return self.code_bytes + 8 * self.has_lists
        links = 8 * int(self._base.hnsw.nb_neighbors(0)) if hasattr(self._base, "hnsw") else 0
        return int(4 * self._base.d + links + 16)

    @property
    def num_lists(self) -> int:
        """Lists the keys are sorted into; 0 for an index without."""
        return int(self._base.nlist) if self.has_lists else 0

    @property
    def has_lists(self) -> bool:
        """True if keys are sorted into lists."""
        return isinstance(self._base, faiss_library().IndexIVF)

    @property
    def rows_to_learn_well(self) -> int:
        """Training rows from which faiss expects good lists and codes: 39 for each centroid."""
        patterns = int(self._base.pq.ksub) if hasattr(self._base, "pq") else 0
        return _ROWS_PER_CENTROID * max(self.num_lists, patterns)

    @property
    def learns(self) -> bool:
        """True if the index must be trained."""
        return not self._index.is_trained

    @property
    def num_rows(self) -> int:
        """Rows in the index."""
        return int(self._base.ntotal)

    @property
    def inner(self) -> Any:
        """The faiss index."""
        return self._index

    def index(self, metric: Metric, name: str) -> FaissIndex:
        """The rows added so far, as an index to be searched."""
        self._index.ntotal = self._base.ntotal
        return FaissIndex(self._index, metric, name)

    def train(self, keys_ND: Array) -> None:
        """Learn lists and compression from a sample. Raises: ValueError when faiss needs more keys."""
        faiss = faiss_library()
        rows = self._scaled(keys_ND)
        try:
            for step in self._chain:
                if not step.is_trained:
                    with _silenced(step):
                        step.train(rows)
                rows = step.apply(rows)
            if self._sorts_by_centroids and self._base.quantizer.ntotal == 0:
                metric = Metric.L2 if self._base.metric_type == faiss.METRIC_L2 else Metric.IP
                settings = {"seed": self._seed, "iterations": self._base.cp.niter, "device": self._device}
                centroids = kmeans(rows, self._base.nlist, metric=metric, **settings)
                self._base.quantizer.add(centroids.numpy())
            elif self.has_lists and not has_fast_int8():
                logger.info("faiss makes the lists: this CPU multiplies 8-bit integers no faster than floats")
            self._base.train(rows)
        except RuntimeError as error:
            why = str(error).rpartition("Error: ")[2]
            raise ValueError(
                f"faiss cannot train {self._factory} on {len(keys_ND)} keys ({why}); choose a simpler --index"
            ) from None
        self._index.is_trained = True

    def encode(self, keys_ND: Array) -> Array:
        """Codes of some keys, (N, code_bytes) uint8."""
        rows = self._prepare(keys_ND)
        if not self._sorts_by_centroids:
            codes: Array = self._base.sa_encode(rows)
            return codes
        pointer = faiss_library().swig_ptr
        if self._assigner is None:
            quantizer = self._base.quantizer
            metric = Metric.L2 if self._base.metric_type == faiss_library().METRIC_L2 else Metric.IP
            centroids = torch.from_numpy(quantizer.reconstruct_n(0, quantizer.ntotal))
            self._assigner = Assigner(centroids, metric, self._device)
        near = self._assigner(torch.from_numpy(rows)).numpy()
        codes = np.zeros((len(rows), self.code_bytes), np.uint8)
        self._base.encode_vectors(len(rows), pointer(rows), pointer(near), pointer(codes), True)
        return codes

    def add_codes(self, codes: Array) -> None:
        """Append rows given their codes."""
        self._base.add_sa_codes(codes)
        self._index.ntotal = self._base.ntotal

    def add(self, keys_ND: Array, threads: int = 1) -> None:
        """Append rows. A graph is the same for the same calls when one thread links it."""
        faiss = faiss_library()
        if self.by_codes:
            self.add_codes(self.encode(keys_ND))
            return
        if hasattr(self._base, "hnsw"):
            # The file does not keep it: a resumed build would draw other levels for its rows.
            self._base.hnsw.rng = faiss.RandomGenerator(self._seed + self.num_rows)
            with faiss_threads(threads):
                self._base.add(self._prepare(keys_ND))
        else:
            self._base.add(self._prepare(keys_ND))
        self._index.ntotal = self._base.ntotal

    def set_probe(self, probe: int) -> None:
        """Lists a search probes by default."""
        if self.has_lists:
            self._base.nprobe = min(probe, self._base.nlist)

    @property
    def _sorts_by_centroids(self) -> bool:
        """True if the lists' centroids are compared one by one and we do that faster than faiss.

        In float32 faiss needs two thirds of our time (measured, one thread).
        """
        faiss = faiss_library()
        if not self.has_lists or (self._device == "cpu" and not has_fast_int8()):
            return False
        quantizer = faiss.downcast_index(self._base.quantizer)
        return isinstance(quantizer, faiss.IndexFlat) and self.by_codes

    def _finished(self) -> Any:
        faiss = faiss_library()
        fast = _FAST_SCAN.search(self._factory) if "IVF" in self._factory else None
        if not fast:
            return self._index
        base = faiss.IndexIVFPQFastScan(self._base, int(fast[3] or _BLOCK_SIZE))
        base.nprobe = self._base.nprobe
        if not self._chain:
            return base
        whole = faiss.IndexPreTransform(base)
        for step in reversed(self._chain):
            whole.prepend_transform(step)
        return whole

    def _scaled(self, keys_ND: Array) -> Array:
        keys = np.ascontiguousarray(keys_ND, dtype=np.float32)
        return normalized(torch.from_numpy(keys)).numpy() if self._metric is Metric.COS else keys

    def _prepare(self, keys_ND: Array) -> Array:
        rows = self._scaled(keys_ND)
        for step in self._chain:
            rows = step.apply(rows)
        return np.ascontiguousarray(rows)


def _silence(index: Any, depth: int = 0) -> None:
    """Keep faiss from warning of few training rows, once for each byte of a code: a build reports it in one line."""
    faiss = faiss_library()
    part = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if hasattr(part, "cp"):
        part.cp.min_points_per_centroid = 1
    for name in ("index", "quantizer", "storage", "pq", "rq"):
        inner = getattr(part, name, None)
        if inner is not None and depth < _DEEPEST:
            _silence(inner, depth + 1)


@contextmanager
def _silenced(step: Any) -> Iterator[None]:
    """Let an OPQ rotation learn in the block without such warnings (400 of OPQ8), with the quantizer it would make."""
    faiss = faiss_library()
    if not isinstance(step, faiss.OPQMatrix) or step.pq is not None:
        yield
        return
    quantizer = faiss.ProductQuantizer(step.d_out, step.M, 8)
    quantizer.cp.min_points_per_centroid = 1
    step.pq = quantizer
    try:
        yield
    finally:
        step.pq = None


def write_index(index: SwigIndex, path: Path) -> None:
    """Write a faiss index so that the name stands for a whole file or none."""
    # Through Python's file: faiss's own writer does not notice when the last bytes find no room (faiss 1.15).
    with replacing(path) as aside, open(aside, "wb") as file:
        faiss_library().write_index(index, faiss_library().PyCallbackIOWriter(file.write))
        file.flush()
        os.fsync(file.fileno())

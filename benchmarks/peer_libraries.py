"""Other libraries' exact and approximate searches, and ours, behind one call, for ``peers.py``. All measure by L2."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(common.ROOT))

from fairseq.memory.index.faiss_library import faiss_library, faiss_threads  # noqa: E402

Array = npt.NDArray[Any]
# Search for k neighbours of float32 queries (N, D) with an effort (what it means is the index's own): int64 ids (N, k).
Search = Callable[[Array, int, Any], Array]
_TORCH_ROWS = 128  # queries of one matrix of scores: 134 MB at 262,144 keys
_PANORAMA_LEVELS = 8  # parts of a key that are compared one after the other


@dataclass(frozen=True)
class Opened:
    """An index that can be searched."""

    search: Search
    bytes_per_key: float
    """Of the index."""
    kept_per_key: Callable[[], float] = lambda: 0.0
    """What searches keep beside it for the next one, of the size of the keys."""
    set_threads: Callable[[int], None] = lambda count: None
    """For libraries that hold the number themselves."""


@dataclass(frozen=True)
class Contender:
    """A library's index, and how to make it."""

    library: str
    index: str
    packages: Sequence[tuple[str, str]]
    """Import name and distribution of what has to be installed."""
    open: Callable[[Array], Opened]
    """Makes the index of float32 keys (M, D)."""
    efforts: Sequence[Sequence[Any]] = ((None,),)
    """Series of settings of a search, each from fast to thorough; one setting for exact indexes."""
    ours: bool = False

    @property
    def name(self) -> str:
        """Library, version and index."""
        version = f" {metadata.version(self.packages[0][1])}" if self.packages else ""
        return f"{self.library}{version}, {self.index}"

    def is_installed(self) -> bool:
        """True if it can be measured."""
        return all(importlib.util.find_spec(name) is not None for name, _ in self.packages)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Give every library so many threads; those that take the number with each call read ``torch.get_num_threads``."""
    import torch

    limits: Any = contextlib.nullcontext()
    if importlib.util.find_spec("threadpoolctl") is not None:  # scikit-learn brings it
        from threadpoolctl import threadpool_limits

        limits = threadpool_limits(count)

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with limits, faiss_threads(count):
            yield
    finally:
        torch.set_num_threads(before)


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


FAISS, NONE = (("faiss", "faiss-cpu"),), ()


def _faiss_search(index: Any) -> Search:
    return lambda query_ND, k, effort: index.search(query_ND, k)[1]


def _faiss_flat(keys_MD: Array) -> Opened:
    faiss = faiss_library()
    index = faiss.IndexFlatL2(keys_MD.shape[1])
    index.add(keys_MD)
    return Opened(_faiss_search(index), 4.0 * keys_MD.shape[1])


def _faiss_panorama(keys_MD: Array) -> Opened:
    faiss = faiss_library()
    dim = keys_MD.shape[1]
    index = faiss.IndexPreTransform(faiss.PCAMatrix(dim, dim), faiss.IndexFlatL2Panorama(dim, _PANORAMA_LEVELS))
    index.train(keys_MD)
    index.add(keys_MD)
    return Opened(_faiss_search(index), 4.0 * (dim + _PANORAMA_LEVELS + 1))


def _usearch_exact(keys_MD: Array) -> Opened:
    from usearch.index import MetricKind, search

    def find(query_ND: Array, k: int, effort: Any) -> Array:
        found = search(keys_MD, query_ND, k, MetricKind.L2sq, exact=True, threads=_num_threads())
        return found.keys.reshape(len(query_ND), k).astype(np.int64)

    return Opened(find, 4.0 * keys_MD.shape[1])


def _svs_flat(keys_MD: Array) -> Opened:
    import svs

    index = svs.Flat(keys_MD, svs.DistanceType.L2, 1)

    def set_threads(count: int) -> None:
        index.num_threads = count

    return Opened(
        lambda query_ND, k, effort: index.search(query_ND, k)[0].astype(np.int64),
        4.0 * keys_MD.shape[1],
        set_threads=set_threads,
    )


def _torch_topk(keys_MD: Array) -> Opened:
    import torch

    keys = torch.from_numpy(keys_MD)
    half_square_M = -0.5 * keys.square().sum(1)

    def find(query_ND: Array, k: int, effort: Any) -> Array:
        parts = torch.from_numpy(query_ND).split(_TORCH_ROWS)
        return torch.cat([torch.addmm(half_square_M, part, keys.T).topk(k).indices for part in parts]).numpy()

    return Opened(find, 4.0 * (keys_MD.shape[1] + 1))


def _scikit_learn(keys_MD: Array) -> Opened:
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(algorithm="brute").fit(keys_MD)
    return Opened(
        lambda query_ND, k, effort: index.kneighbors(query_ND, k, return_distance=False),
        4.0 * keys_MD.shape[1],
    )


def _our_exact(keys_MD: Array) -> Opened:
    import torch

    from fairseq.memory.index.exact.index import ExactIndex
    from fairseq.memory.types import Metric

    half_MD = keys_MD.astype(np.float16)  # as the keys were, and as stores hold them
    index = ExactIndex(half_MD, Metric.L2)
    return Opened(
        lambda query_ND, k, effort: index.search(torch.from_numpy(query_ND), k).ids_NK.numpy(),
        float(half_MD.itemsize * half_MD.shape[1]),
        lambda: index.kept_bytes / len(half_MD),
    )


EXACT: Sequence[Contender] = (
    Contender("fairseq-memory", "ExactIndex, float16 keys", NONE, _our_exact, ours=True),
    Contender("faiss", "IndexFlatL2", FAISS, _faiss_flat),
    Contender("faiss", "PCA, IndexFlatL2Panorama", FAISS, _faiss_panorama),
    Contender("usearch", "exact", (("usearch", "usearch"),), _usearch_exact),
    Contender("svs", "Flat", (("svs", "scalable-vs"),), _svs_flat),
    Contender("torch", "matmul, topk", (("torch", "torch"),), _torch_topk),
    Contender("scikit-learn", "brute", (("sklearn", "scikit-learn"),), _scikit_learn),
)

_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _faiss_factory(factory: str) -> Callable[[Array], Opened]:
    """An index with lists or a graph that faiss makes and searches; the effort is the lists probed or keys in view."""

    def make(keys_MD: Array) -> Opened:
        faiss = faiss_library()
        index = faiss.index_factory(keys_MD.shape[1], factory)
        index.train(keys_MD)
        index.add(keys_MD)
        size = len(faiss.serialize_index(index)) / len(keys_MD)
        return Opened(_effort_search(index), size)

    return make


def _effort_search(index: Any) -> Search:
    """Search with (lists probed, candidates per neighbour that are scored again), or with the keys in view."""
    faiss = faiss_library()
    refined = isinstance(index, faiss.IndexRefine)
    inner = faiss.downcast_index(index.base_index) if refined else index
    lists = faiss.downcast_index(faiss.try_extract_index_ivf(inner)) if not hasattr(inner, "hnsw") else None

    def find(query_ND: Array, k: int, effort: Any) -> Array:
        if lists is None:
            inner.hnsw.efSearch = max(k, effort)  # with fewer in view than k it finds no more than those
            return index.search(query_ND, k)[1]
        lists.nprobe = min(effort[0], lists.nlist)
        if refined:
            index.k_factor = effort[1]
        return index.search(query_ND, k)[1]

    return find


def _our_index(kind: str, lists: int, code_size: int, *, keeps: bool = True) -> Callable[[Array], Opened]:
    """An index of ours, built over a store of float16 keys in a temporary folder; the effort is the lists probed."""

    def make(keys_MD: Array) -> Opened:
        import torch

        from fairseq.memory.index.build.build import build_index
        from fairseq.memory.index.build.config import BuildConfig
        from fairseq.memory.index.faiss.index import FaissIndex
        from fairseq.memory.types import Metric

        with tempfile.TemporaryDirectory() as made:
            prefix, name = str(Path(made) / "store"), str(Path(made) / "index")
            _write_store(prefix, keys_MD)
            sizes = {"ncentroids": lists, "code_size": code_size, "no_report": True, "use_faiss_cpu": True}
            built = build_index(BuildConfig(dstore_mmap=prefix, faiss_index=name, index=kind, **sizes))
            size = built.bytes / len(keys_MD)
            index = FaissIndex.open(name, Metric.L2)
            index.kept_bytes = index.kept_bytes if keeps else 0

        def find(query_ND: Array, k: int, effort: Any) -> Array:
            index.set_probe(effort[0])
            return index.search(torch.from_numpy(query_ND), k).ids_NK.numpy()

        return Opened(find, size, lambda: _kept_bytes(index) / len(keys_MD))

    return make


def _write_store(prefix: str, keys_MD: Array) -> None:
    from fairseq.memory.datastore.writer import DatastoreWriter

    with DatastoreWriter(prefix, *keys_MD.shape, "float16") as writer:
        writer.append(keys_MD, np.zeros(len(keys_MD), np.int64))
        writer.finish()


def _kept_bytes(index: Any) -> int:
    """Decoded lists that our index keeps after a search; its buffers, which do not grow with the keys, not counted."""
    return index._lists.num_bytes if index._lists is not None else 0


def approximate(rows: int, dim: int) -> Sequence[Contender]:
    """Indexes for so many keys; those of one kind have the same lists and codes in both libraries."""
    lists = 1 << round(np.log2(rows) / 2 + 1)
    probes = [[(probe, 1) for probe in _PROBES]]
    refines = [[(probe, factor) for probe in _PROBES] for factor in (1, 2, 4)]
    ours = {
        f"ivfpq {dim // 16}": _our_index("ivfpq", lists, dim // 16, keeps=False),
        f"ivfpq {dim // 4}": _our_index("ivfpq", lists, dim // 4, keeps=False),
        f"ivfpq {dim // 4}, lists kept decoded": _our_index("ivfpq", lists, dim // 4),
        "ivfpq-fastscan": _our_index("ivfpq-fastscan", lists, dim // 16),
        "ivfrabitq": _our_index("ivfrabitq", lists, 1),
        "ivfsq8": _our_index("ivfsq8", lists, 1),
        f"IVF{lists},Flat": _our_index(f"IVF{lists},Flat", lists, 1),
    }
    theirs: Mapping[str, Sequence[Any]] = {f"IVF{lists},PQ{dim // part}np": probes for part in (16, 4)} | {
        f"IVF{lists},PQ{dim // 8}x4fsr,Refine(SQ8)": refines,
        f"IVF{lists},PQ{dim // 8}x4fsr,RFlat": refines,
        f"RR{dim},IVF{lists},RaBitQ,Refine(SQ8)": refines,
        f"RR{dim},IVF{lists},RaBitQ,RFlat": refines,
        f"IVF{lists},SQ8": probes,
        f"PCA{dim},IVF{lists},FlatPanorama{_PANORAMA_LEVELS}_128": probes,
        "HNSW32": [(16, 32, 64, 128, 256, 512, 1024, 2048, 4096)],
    }
    return [
        Contender("fairseq-memory", "ExactIndex, float16 keys", NONE, _our_exact, ours=True),
        *(Contender("fairseq-memory", index, NONE, make, probes, ours=True) for index, make in ours.items()),
        *(Contender("faiss", factory, FAISS, _faiss_factory(factory), efforts) for factory, efforts in theirs.items()),
    ]

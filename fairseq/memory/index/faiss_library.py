"""The only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.types import Array, Metric

_TABLE_BYTES = 8 << 20  # of fast-scan lists, for each thread
_MOST_QUERIES = 512
_CODED_AT_ONCE = 256


class SwigIndex(Protocol):
    """A faiss index of any kind; lists, codes and graphs are attributes of some kinds only."""

    d: int
    ntotal: int
    metric_type: int
    is_trained: bool

    def __getattr__(self, name: str) -> Any: ...


@functools.cache
def faiss_library() -> Any:
    """The faiss module."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports at INFO which CPU it found
    import faiss

    # Keys whose parts have 16 columns or more are coded by tables of all their distances: 64 KB a key of 64 parts, 1 GB
    # for a block of a build. Tables that stay in the cache make the same codes in a third of the time (faiss 1.15).
    settings: Any = faiss.cvar
    settings.product_quantizer_compute_codes_bs = _CODED_AT_ONCE
    return faiss


def search_faiss(index: SwigIndex, query_ND: Array, k: int, params: object = None) -> tuple[Array, Array]:
    """Distances or products, and rows, (N, k) each; the only call of a faiss search.

    The arrays are zero beforehand: fast-scan lists of faiss 1.15 read the distances before they write them (k of 2 to
    20), and a greatest float left in a freed array makes them find nothing.
    """
    distances_NK, ids_NK = np.zeros((len(query_ND), k), np.float32), np.zeros((len(query_ND), k), np.int64)
    search: Any = index.search
    at_once = _queries_at_once(index)
    for start in range(0, len(query_ND), at_once):
        rows = slice(start, start + at_once)
        search(query_ND[rows], k, params=params, D=distances_NK[rows], I=ids_NK[rows])
    return distances_NK, ids_NK


def _queries_at_once(index: SwigIndex) -> int:
    """Queries that are searched in one call.

    Fast-scan lists make the tables of all queries and probed lists before they scan: 960 queries with 32 lists took 1.3
    times as long each as 128 did, whose tables stay in the cache. From 1,000 queries on the distances to the
    lists' centres are made of products, whose rounding changes the results (both in faiss 1.15, AVX2).
    """
    if type(index).__name__ != "IndexIVFPQFastScan":
        return sys.maxsize
    table_bytes = int(index.nprobe * index.pq.M * index.pq.ksub * np.dtype(np.float32).itemsize)
    return min(_MOST_QUERIES, max(1, _TABLE_BYTES // table_bytes) * int(faiss_library().omp_get_max_threads()))


def has_byte_codes(index: SwigIndex) -> bool:
    """True if a faiss index has lists of product-quantized keys, a byte for each part of a key."""
    return type(index).__name__ == "IndexIVFPQ" and index.pq.nbits == 8 and index.nlist > 0


def bulk_queries_per_list(index: SwigIndex, *, is_kept: bool = True) -> int:
    """Queries of a search per list from which decoding its keys (``lists.decoded_lists``) pays; 0 if that cannot be.

    Product-quantized keys that are decoded anew for each bulk cost more the wider they are, and less is saved the
    smaller their codes are (65,536 keys of width 576 in codes of 36 bytes, k 10 and 1024: 0.4 of faiss's queries/s at
    64 queries per list, 1.2 at 256). Decoding a key and rounding it costs about as much as ten of its distances; those
    to keys of a byte a column take faiss half as long as others (65,536 keys of width 576, k 10 and 100: 0.6 of faiss's
    queries/s at 16 queries per list, 0.9 at 32, 1.4 at 64).
    """
    kind = type(index).__name__
    if has_byte_codes(index) and not is_kept:
        return max(16, 10 * int(index.d) // int(index.code_size))
    if has_byte_codes(index) or (kind == "IndexIVFFlat" and index.nlist > 0):
        return 16
    is_bytes = kind == "IndexIVFScalarQuantizer" and index.sq.qtype == faiss_library().ScalarQuantizer.QT_8bit
    return 40 if is_bytes and index.nlist > 0 else 0


def has_codes_in_ram(index: SwigIndex) -> bool:
    """True if a faiss index has such lists, and their codes are arrays in RAM rather than in a mapped file."""
    if not has_byte_codes(index):
        return False
    lists = faiss_library().downcast_InvertedLists(index.invlists)
    return type(lists).__name__ == "ArrayInvertedLists" and lists.code_size == index.pq.M


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Let faiss use so many threads in the block."""
    faiss = faiss_library()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


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

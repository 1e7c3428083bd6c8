"""The only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.types import Array, Metric


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

    return faiss


def search_faiss(index: SwigIndex, query_ND: Array, k: int, params: object = None) -> tuple[Array, Array]:
    """Distances or products, and rows, (N, k) each; the only call of a faiss search.

    The arrays are zero beforehand: fast-scan lists of faiss 1.15 read the distances before they write them (k of 2 to
    20), and a greatest float left in a freed array makes them find nothing.
    """
    distances_NK, ids_NK = np.zeros((len(query_ND), k), np.float32), np.zeros((len(query_ND), k), np.int64)
    search: Any = index.search
    search(query_ND, k, params=params, D=distances_NK, I=ids_NK)
    return distances_NK, ids_NK


def has_byte_codes(index: SwigIndex) -> bool:
    """True if a faiss index has lists of product-quantized keys, a byte for each part of a key."""
    return type(index).__name__ == "IndexIVFPQ" and index.pq.nbits == 8 and index.nlist > 0


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

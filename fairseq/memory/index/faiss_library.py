"""The only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@functools.cache
def faiss_library() -> Any:
    """The faiss module."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells at INFO which processor it found
    import faiss

    return faiss


def has_byte_codes(index: Any) -> bool:
    """Whether a faiss index has lists of product-quantized keys, a byte for each part of a key."""
    return type(index).__name__ == "IndexIVFPQ" and index.pq.nbits == 8 and index.nlist > 0


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

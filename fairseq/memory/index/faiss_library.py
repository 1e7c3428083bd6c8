"""The only module that imports faiss, and only when an index is made or opened."""

from __future__ import annotations

import functools
import logging
from typing import Any


@functools.cache
def faiss_library() -> Any:
    """The faiss module."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells at INFO which processor it found
    import faiss

    return faiss

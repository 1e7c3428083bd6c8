"""Exact search over the keys of a store, without an index to build."""

from typing import TYPE_CHECKING

from fairseq.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from fairseq.memory.index.exact.index import ExactIndex

__all__ = ["ExactIndex"]

__getattr__, __dir__ = lazy_names(__name__, {"ExactIndex": "fairseq.memory.index.exact.index"})

"""Builds an index over a datastore: train, encode, assemble; every step survives a kill."""

from typing import TYPE_CHECKING

from fairseq.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from fairseq.memory.index.build.build import build_index

__all__ = ["build_index"]

__getattr__, __dir__ = lazy_names(__name__, {"build_index": "fairseq.memory.index.build.build"})

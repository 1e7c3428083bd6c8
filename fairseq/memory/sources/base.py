"""The interface of sources of candidates.

Shapes: N scored positions, D key width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fairseq.memory.types import Candidates, Passage


class Source(Protocol):
    """A memory that offers tokens to scored positions, whatever was read before them."""

    def lookup(self, query_ND: Tensor) -> Candidates:
        """Candidates for N positions, given their keys."""
        ...


class TextSource(Protocol):
    """A memory of the text that is being scored, passage by passage in its order."""

    def lookup(self, passage: Passage) -> Candidates:
        """Candidates for the scored positions of a passage; none of them sees itself or what comes after it."""
        ...

    def append(self, passage: Passage) -> None:
        """Take in a passage that has been scored."""
        ...

    def reset(self) -> None:
        """Forget everything: another text begins."""
        ...

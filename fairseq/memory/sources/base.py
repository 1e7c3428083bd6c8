"""What every source of candidates can do."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fairseq.memory.types import Candidates


class Source(Protocol):
    """A memory that offers tokens to scored positions."""

    def lookup(self, query_ND: Tensor) -> Candidates:
        """Candidates for N positions, given their keys."""
        ...

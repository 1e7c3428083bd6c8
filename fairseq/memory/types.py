"""What the memory core hands around. Scores are *higher is closer* everywhere.

Shapes: N queries (scored positions), K neighbours, M candidates, D key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Metric(str, Enum):
    """How the closeness of a query and a key is measured."""

    L2 = "l2"  # minus the squared Euclidean distance
    IP = "ip"  # inner product
    COS = "cos"  # inner product of the vectors scaled to length one

    @classmethod
    def parse(cls, name: str) -> Metric:
        """Read a metric's name. Raises: ValueError with the known names."""
        try:
            return cls(name)
        except ValueError:
            raise ValueError(f"unknown metric {name!r}; known: {', '.join(m.value for m in cls)}") from None


@dataclass(frozen=True)
class Neighbors:
    """What a search returns, best first."""

    ids_NK: Tensor
    """int64 row numbers in the store, -1 where fewer than K were found."""
    scores_NK: Tensor
    """float32, higher is closer; -inf where the id is -1."""

    def __post_init__(self) -> None:
        assert self.ids_NK.shape == self.scores_NK.shape, (self.ids_NK.shape, self.scores_NK.shape)
        assert self.ids_NK.dtype == torch.int64, self.ids_NK.dtype


@dataclass(frozen=True)
class Candidates:
    """What a memory offers to N positions: M tokens each (or one shared row of M), with a score and a permission."""

    values_NM: Tensor
    """int64 token of each candidate; (N, M), or (1, M) when all positions share the candidates."""
    scores_NM: Tensor
    """float32 similarity before any temperature, higher is closer; (N, M)."""
    keep_NM: Tensor
    """bool, True where position n may use candidate m; (N, M)."""

    def __post_init__(self) -> None:
        assert self.scores_NM.shape == self.keep_NM.shape, (self.scores_NM.shape, self.keep_NM.shape)
        assert self.keep_NM.dtype == torch.bool, self.keep_NM.dtype

    def same_token(self, target_N: Tensor) -> Tensor:
        """bool (N, M): whether the candidate's token is the position's target."""
        return self.values_NM == target_N[:, None]

"""Finding the memories that hold a given token without comparing every position with every memory.

In running text about one pair in a hundred is a pair of equal tokens. Shapes: N positions, M memories, R some of the
positions, P pairs found.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenPositions:
    """The places of each token in a memory, sorted: those within a range of places are one run."""

    def __init__(self, token_M: Tensor) -> None:
        self.num_places = len(token_M)
        self.place_M = torch.argsort(token_M, stable=True)
        self._key_M = token_M[self.place_M] * self.num_places + self.place_M

    def between(self, token_N: Tensor, low_N: Tensor | int, high_N: Tensor | int) -> tuple[Tensor, Tensor]:
        """For each token, where the run of its places from ``low`` up to ``high`` starts, and how many there are."""
        first_N, past_N = (
            torch.searchsorted(self._key_M, token_N * self.num_places + bound) for bound in (low_N, high_N)
        )
        return first_N, past_N - first_N

    def pairs(self, first_R: Tensor, count_R: Tensor) -> tuple[Tensor, Tensor]:
        """Write out runs: the row of each pair and the place it is paired with, (P,) each, row after row."""
        row_P = torch.repeat_interleave(count_R)
        before_R = first_R - (count_R.cumsum(0) - count_R)
        index_P = before_R.index_select(0, row_P)
        index_P += torch.arange(len(row_P), device=row_P.device)
        return row_P, self.place_M.index_select(0, index_P)

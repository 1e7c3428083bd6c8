"""Batches that the data layer hands to models.

Shapes: B blocks (rows), T positions of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LMBatch:
    """Blocks of text for next-token prediction, padded on the right. A batch without rows (B = 0) is valid."""

    ids_B: Tensor
    """int64 number of each block in its dataset."""
    tokens_BT: Tensor
    """int64 inputs of the model."""
    target_BT: Tensor
    """int64 next token of each position; pad where there is none."""
    scored_BT: Tensor
    """bool, True where the target counts; False on context and padding."""
    num_scored: int = -1
    """Scored positions; counted on construction unless given (counting on a GPU would wait for it)."""

    def __post_init__(self) -> None:
        assert self.tokens_BT.shape == self.target_BT.shape == self.scored_BT.shape, (
            self.tokens_BT.shape,
            self.target_BT.shape,
            self.scored_BT.shape,
        )
        assert self.scored_BT.dtype == torch.bool, self.scored_BT.dtype
        if self.num_scored < 0:
            object.__setattr__(self, "num_scored", int(self.scored_BT.sum()))

    @classmethod
    def empty(cls) -> LMBatch:
        """A batch without rows, for a rank that has no work in a step."""
        nothing = torch.empty(0, 1, dtype=torch.int64)
        return cls(torch.empty(0, dtype=torch.int64), nothing, nothing, nothing.bool(), 0)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """The fields in order, so that ``LMBatch(*batch.parts())`` equals the batch."""
        return self.ids_B, self.tokens_BT, self.target_BT, self.scored_BT, self.num_scored

    def to(self, device: torch.device | str) -> LMBatch:
        """The same batch on another device."""
        ids_B, tokens_BT, target_BT, scored_BT = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.ids_B, self.tokens_BT, self.target_BT, self.scored_BT)
        )
        return LMBatch(ids_B, tokens_BT, target_BT, scored_BT, self.num_scored)

"""Batches that the data layer hands to models.

Shapes: B blocks (rows), T positions of the longest row, S positions of the longest source sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="LMBatch")


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
    def empty(cls: type[B]) -> B:
        """A batch without rows, for a rank that has no work in a step."""
        nothing = torch.empty(0, 1, dtype=torch.int64)
        return cls(torch.empty(0, dtype=torch.int64), nothing, nothing, nothing.bool(), 0)

    @property
    def source(self) -> dict[str, Any]:
        """What the model reads besides ``tokens_BT``, by name."""
        return {}

    def parts(self) -> tuple[Any, ...]:
        """The fields in order, so that ``type(batch)(*batch.parts())`` equals the batch."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self: B, device: torch.device | str) -> B:
        """The same batch on another device."""
        moved = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self.parts()]
        return type(self)(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TranslationBatch(LMBatch):
    """Target sentences with the source sentences they translate, which are padded on the left or on the right."""

    source_BS: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.int64))
    """int64 source sentences, </s> included."""

    @property
    def source(self) -> dict[str, Any]:
        """See the base class."""
        return {"source_BS": self.source_BS}

"""Output of a language model. Shapes: B batch, T time, D width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LMOutput:
    """Inner states of every position."""

    hidden_BTD: Tensor
    """Input of the output layer."""
    key_BTD: Tensor | None
    """The state asked for as memory key; None when none was asked for."""

"""Bounds on the error of vectors that are rounded to few bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dither(width: int) -> Tensor:
    """One number per column, uniform in [0, 1), always the same."""
    return torch.rand(width, generator=torch.Generator().manual_seed(width))


def most_steps(width: int) -> float:
    """Bound on a rounded vector's error in any direction, in steps.

    Rounding x as ``floor(x + u) + 1/2 - u``, u drawn once per column, makes errors that are uniform, independent and of
    mean zero whatever x is. A sum of them beyond this many steps has a chance of 1e-15; half a step times the root of
    the width is never passed.
    """
    return min(math.sqrt(2 * math.log(2e15) / 12), 0.5 * math.sqrt(width))

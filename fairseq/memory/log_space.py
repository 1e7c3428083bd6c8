"""Sums of numbers that are given by their logarithms."""

from __future__ import annotations

import torch
from torch import Tensor


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp(a) + exp(b))``, elementwise; minus infinity with a zero gradient, never NaN, where both are that.

    No bit of a result depends on how many others are computed with it. Those of torch.logaddexp do: full vectors take
    another logarithm than the elements after them, and how many those are depends on the CPU and the number
    of threads. Its exp and log1p are one function for both.
    """
    neither = torch.isneginf(a) & torch.isneginf(b)
    a = a.masked_fill(neither, 0.0)
    return torch.maximum(a, b).add((a - b).abs().neg().exp().log1p()).masked_fill(neither, -torch.inf)

"""Scores in 8-bit integers with a bound on their error: a filter that lets through all that could matter.

Shapes: N queries, M keys of a list, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW_GROUP = 32
"""The number of keys is filled up to a multiple of this; torch's maximum over so many neighbours is its fastest."""
_LEVELS = 127
_OFFSET_COLUMNS = 4  # the products run fastest over a multiple of four columns


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


class Int8Queries:
    """Queries rounded to 8 bits once, to be multiplied with many lists."""

    def __init__(self, query_ND: Tensor) -> None:
        """Take float32 queries that end in a 1 (see :class:`Int8Keys`)."""
        self.query_ND = query_ND
        core_ND = query_ND[:, :-1]
        # A few values only, so that keys prepared for one bulk of queries (see Int8Keys) mostly serve the next as well.
        self.largest = 2.0 ** (math.ceil(8 * math.log2(max(float(core_ND.abs().amax()), 1e-30))) / 8)
        self.step = self.largest / _LEVELS
        self.low_ND = torch.full((len(query_ND), core_ND.shape[1] + _OFFSET_COLUMNS), _LEVELS, dtype=torch.int8)
        rounded_ND = (core_ND / self.step).round_()
        self.low_ND[:, : core_ND.shape[1]] = rounded_ND
        rounded_ND *= self.step
        # What rounding keys leaves out of them (see Int8Keys), in units of their steps.
        self.dither_D = dither(core_ND.shape[1])
        self.left_out_N = torch.mv(rounded_ND, 0.5 - self.dither_D)
        self.error_N = torch.linalg.vector_norm(core_ND - rounded_ND, dim=1)
        self.size_N = torch.linalg.vector_norm(core_ND, dim=1)


class Int8Keys:
    """Keys of a list in 8 bits, less their mean: what is left is smaller, so that its steps are finer.

    Rounding is ``floor(x + dither) + 1/2 - dither``; see ``most_steps``.

    The offset behind each key becomes some more columns, met by constants in the queries. Rows of zeros behind the keys
    fill up the last group.
    """

    def __init__(self, keys_MD: Tensor, queries: Int8Queries) -> None:
        """Take float32 keys (M, D + 1) whose last column is added to the product."""
        width = keys_MD.shape[1] - 1
        self.mean_D = keys_MD.mean(0)
        rest_MD = keys_MD - self.mean_D
        core_MD, offset_M = rest_MD[:, :width], rest_MD[:, width] / (_OFFSET_COLUMNS * queries.largest)
        largest = max(float(core_MD.amax()), -float(core_MD.amin()), float(offset_M.abs().amax()), 1e-30)
        self.step = largest / _LEVELS
        self.size = float(torch.linalg.vector_norm(core_MD, dim=1).amax())
        self.error = most_steps(width) * self.step
        # Rounding moves each entry by half a step at most.
        self.longer = 0.5 * self.step * math.sqrt(width)
        rows = -(-len(keys_MD) // LOW_GROUP) * LOW_GROUP
        self.low_MD = torch.zeros(rows, width + _OFFSET_COLUMNS, dtype=torch.int8)
        self.low_MD[: len(keys_MD), :width] = core_MD.mul_(1.0 / self.step).add_(queries.dither_D).floor_()
        # The columns of an offset differ by one where need be, so that their sum is off by half a step at most.
        sums_ME = (offset_M[:, None] / self.step * torch.arange(_OFFSET_COLUMNS + 1)).round_()
        self.low_MD[: len(keys_MD), width:] = sums_ME.diff(dim=1)
        self.offset_error = 0.5 * self.step * queries.largest


def low_scores(queries: Int8Queries, part: Tensor, keys: Int8Keys, threshold_N: Tensor, out: Tensor) -> Tensor:
    """Write int32 scores of some queries into ``out`` (N, M); returns a threshold (N,) for them.

    Every key whose true score reaches ``threshold_N`` reaches the returned one.
    """
    torch._int_mm(queries.low_ND[part], keys.low_MD.T, out=out)
    # |q.k - q'.k'| <= |q.(k - k')| + |q - q'| |k'|, where k' may be longer than k.
    margin_N = queries.size_N[part] * keys.error + queries.error_N[part] * (keys.size + keys.longer) + keys.offset_error
    low_N = threshold_N - torch.mv(queries.query_ND[part], keys.mean_D) - queries.left_out_N[part] * keys.step
    low_N -= 1.01 * margin_N
    low_N = (low_N / (queries.step * keys.step)).floor_().clamp_(-(2.0**30), 2.0**30)
    rounded_N: Tensor = low_N.to(torch.int32)
    return rounded_N

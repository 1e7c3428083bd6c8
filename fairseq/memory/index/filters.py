"""Approximate scores whose error is bounded: exact search passes over all keys by them and looks at few again.

Scores here are ``query . key``, for L2 less half the key's squared length, so that all metrics are ranked alike.

Shapes: N queries, M keys of a block, D width, C columns that hold the offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GROUP = 32
"""Blocks are filled up to a multiple of this; torch's maximum over so many neighbours is its fastest."""
_CHUNK_ROWS = 256  # of keys rounded at a time: they stay in the cache between the passes
_LEVELS = 127
# With the dither the errors of a product's terms are independent and of mean zero, whatever the data: a sum beyond
# this many steps times the other vector's length has a chance of 1e-20 (Hoeffding's inequality).
_DITHERED = math.sqrt(0.5 * math.log(2e20))
# A float32 product of vectors is off by a few units in the seventh place of their lengths.
_ROUNDING = 2e-6
_BF16_ROUNDING = 2.0**-8 + 2.0**-16 + _ROUNDING  # of both factors


@dataclass(frozen=True)
class Block:
    """Keys as a filter multiplies them; rows of zeros behind them fill up the last group."""

    low_MD: Tensor
    num_rows: int
    step: float
    """One unit of the approximate scores is this many true ones, times the queries' step."""
    shift_D: Tensor
    """What was taken off every key: the product with it is the same for all keys."""
    size: float
    """Length of the longest key, less the shift."""
    offset: float
    """The middle of the keys' offsets."""
    offset_error: float


class Filter(Protocol):
    """Approximate scores of all queries with a block of keys."""

    dtype: torch.dtype
    """Of the approximate scores."""

    def block(self, keys_MD: Tensor) -> Block:
        """Take in keys of any floating type."""
        ...

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """Write the approximate scores of some queries."""
        ...

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """Scale, shift (N,) and margin (N,): a true score is within the margin of ``scale * approximate + shift``."""
        ...


class Int8Filter:
    """Both factors rounded to 8 bits, for processors that multiply those fast."""

    dtype = torch.int32

    def __init__(self, query_ND: Tensor, sample_MD: Tensor, *, with_offset: bool) -> None:
        """Args.

        query_ND: float32.
        sample_MD: some keys; by their ranges widths of steps are shared out between queries and keys.
        with_offset: L2; see the module.
        """
        width = query_ND.shape[1]
        self.with_offset = with_offset
        self.mean_D = sample_MD.float().mean(0)
        # Where keys reach far and queries do not, keys are made smaller and queries larger by the same factor.
        key_D = (sample_MD.float() - self.mean_D).abs_().amax(0).clamp_(min=1e-20)
        query_D = query_ND.abs().amax(0).clamp_(min=1e-20)
        self.balance_D = (query_D / key_D).sqrt_()
        self.balance_D /= self.balance_D.log().mean().exp()
        self.dither_D = torch.rand(width, generator=torch.Generator().manual_seed(width))
        balanced_ND = query_ND / self.balance_D
        self.step = max(float(balanced_ND.abs().amax()) if len(query_ND) else 0.0, 1e-30) / _LEVELS
        self.size_N = torch.linalg.vector_norm(balanced_ND, dim=1)
        self.columns = max(4, width // 256 * 4) if with_offset else 0
        padding = -(width + self.columns) % 4
        self.low_ND = torch.zeros(len(query_ND), width + self.columns + padding, dtype=torch.int8)
        self.low_ND[:, :width] = balanced_ND.div_(self.step).add_(self.dither_D.flip(0)).floor_()
        self.low_ND[:, width : width + self.columns] = _LEVELS
        self.query_ND = query_ND

    def block(self, keys_MD: Tensor) -> Block:
        """See ``Filter``."""
        count, width = keys_MD.shape
        low_MD = torch.zeros(-(-count // GROUP) * GROUP, self.low_ND.shape[1], dtype=torch.int8)
        low_D, high_D = torch.aminmax(keys_MD, dim=0)
        reach_D = torch.maximum(high_D.float() - self.mean_D, self.mean_D - low_D.float())
        largest = max(float((reach_D * self.balance_D).amax()), 1e-30)
        offset_M = -0.5 * squared_lengths(keys_MD) if self.with_offset else keys_MD.new_zeros(1, dtype=torch.float32)
        middle = 0.5 * float(offset_M.amin() + offset_M.amax())
        largest_offset = float((offset_M - middle).abs().amax())
        if self.columns:
            largest = max(largest, largest_offset / (self.columns * self.step * _LEVELS))
        step = largest / _LEVELS
        # floor((key - mean) * balance / step + dither), in two passes
        factor_D = self.balance_D / step
        add_D = self.dither_D - self.mean_D * factor_D
        buffer = torch.empty(_CHUNK_ROWS, width)
        size = 0.0
        for start in range(0, count, _CHUNK_ROWS):
            part_MD = keys_MD[start : start + _CHUNK_ROWS]
            chunk_MD = torch.mul(part_MD, factor_D, out=buffer[: len(part_MD)]).add_(add_D).floor_()
            low_MD[start : start + len(part_MD), :width] = chunk_MD.clamp_(-_LEVELS - 1, _LEVELS)
            size = max(size, float(chunk_MD.square_().sum(1).amax()))
        if self.columns:
            # The columns of an offset differ by one where need be: their sum is off by half a step at most.
            units_M = (offset_M - middle) / (step * self.step * _LEVELS)
            share_E = torch.arange(self.columns + 1) / self.columns
            low_MD[:count, width : width + self.columns] = (units_M[:, None] * share_E).round_().diff(dim=1)
        offset_error = 0.5 * step * self.step * _LEVELS if self.columns else 0.0
        return Block(low_MD, count, step, self.mean_D, math.sqrt(size) * step, middle, offset_error)

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """See ``Filter``."""
        torch._int_mm(self.low_ND[rows], block.low_MD.T, out=out_NM)

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """See ``Filter``."""
        width = self.query_ND.shape[1]
        steps = min(_DITHERED, math.sqrt(width))
        # |q.k - q'.k'| <= |q.(k - k')| + |(q - q').k'|, and what rounding to float32 adds
        margin_N = self.size_N[rows] * (steps * block.step + _ROUNDING * block.size)
        margin_N += steps * self.step * block.size + block.offset_error + _ROUNDING * abs(block.offset)
        shift_N = torch.mv(self.query_ND[rows], block.shift_D) + block.offset
        return self.step * block.step, shift_N, margin_N


class FloatFilter:
    """Products in float32, or in bfloat16 where the processor multiplies those fast."""

    def __init__(self, query_ND: Tensor, *, with_offset: bool, dtype: torch.dtype = torch.float32) -> None:
        """Take float32 queries; see ``Int8Filter``."""
        self.with_offset, self.dtype = with_offset, dtype
        self.size_N = torch.linalg.vector_norm(query_ND, dim=1)
        # An offset is the sum of three narrow numbers, met by ones.
        ones = query_ND.new_ones(len(query_ND), 3 if with_offset else 0)
        self.low_ND = torch.cat([query_ND, ones], 1).to(dtype)
        self.rounding = _ROUNDING if dtype is torch.float32 else _BF16_ROUNDING

    def block(self, keys_MD: Tensor) -> Block:
        """See ``Filter``."""
        count, width = keys_MD.shape
        low_MD = self.low_ND.new_zeros(-(-count // GROUP) * GROUP, self.low_ND.shape[1])
        low_MD[:count, :width] = keys_MD
        size_M = squared_lengths(keys_MD)
        middle = largest = 0.0
        if self.with_offset:
            offset_M = -0.5 * size_M
            middle = 0.5 * float(offset_M.amin() + offset_M.amax())
            offset_M -= middle
            largest = float(offset_M.abs().amax())
            for column in range(width, width + 3):
                low_MD[:count, column] = offset_M
                offset_M -= low_MD[:count, column].float()
        size = math.sqrt(float(size_M.amax()))
        zero_D = torch.zeros(1)
        offset_error = self.rounding * largest + _ROUNDING * abs(middle)
        return Block(low_MD, count, 1.0, zero_D, size, middle, offset_error)

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """See ``Filter``."""
        torch.mm(self.low_ND[rows], block.low_MD.T, out=out_NM)

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """See ``Filter``."""
        # The last term is the rounding of the sum itself, which is no larger than what it sums.
        margin_N = (2 * self.rounding * block.size) * self.size_N[rows] + 2 * block.offset_error
        return 1.0, torch.full_like(margin_N, block.offset), margin_N


def squared_lengths(keys_MD: Tensor) -> Tensor:
    """Squared length of each row, (M,) float32."""
    parts = [part.float() for part in torch.split(keys_MD, _CHUNK_ROWS)]
    return torch.cat([torch.linalg.vecdot(part, part) for part in parts])

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

from fairseq.memory.index.ops import kernels
from fairseq.memory.index.ops.rounding import dither, most_steps

_CHUNK_ROWS = 256  # of keys rounded at a time: they stay in the cache between the passes
_LEVELS = 127
# A float32 product of vectors is off by a few units in the seventh place of their lengths.
_ROUNDING = 2e-6
_BF16_ROUNDING = 2.0**-8 + 2.0**-16 + _ROUNDING  # of both factors


@dataclass(frozen=True)
class Block:
    """Keys as a filter multiplies them; rows of zeros after them fill up the last group."""

    quantized_MD: Tensor
    num_rows: int
    step: float
    """One unit of the approximate scores is this many true ones, times the queries' step."""
    size: float
    """Length of the longest key, less what the filter takes off all keys."""
    offset: float
    """The middle of the keys' offsets."""
    offset_error: float


class Filter(Protocol):
    """Approximate scores of all queries with a block of keys."""

    dtype: torch.dtype
    """Of the approximate scores."""

    def block(self, keys_MD: Tensor) -> Block:
        """Quantize keys of any floating type."""
        ...

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """Write the approximate scores of some queries."""
        ...

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """Scale, shift (N,) and margin (N,): a true score is within the margin of ``scale * approximate + shift``."""
        ...


class Int8Filter:
    """Both factors rounded to 8 bits, for CPUs that multiply those fast."""

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
        self.balance_D = balance(query_ND, sample_MD.float() - self.mean_D)
        self.key_dither_D, query_dither_D = torch.split(dither(2 * width), width)
        balanced_ND = query_ND / self.balance_D
        self.step = max(float(balanced_ND.abs().amax()) if len(query_ND) else 0.0, 1e-30) / _LEVELS
        self.size_N = torch.linalg.vector_norm(balanced_ND, dim=1)
        self.columns = max(4, width // 256 * 4)
        padding = -(width + self.columns) % 4
        self.quantized_ND = torch.zeros(len(query_ND), width + self.columns + padding, dtype=torch.int8)
        rounded_ND = balanced_ND.div_(self.step).add_(query_dither_D).floor_()
        self.quantized_ND[:, :width] = rounded_ND
        self.quantized_ND[:, width : width + self.columns] = _LEVELS
        self.remainder_D = 0.5 - query_dither_D
        self.most = most_steps(width)
        # Products of the queries with the part of all keys that their 8 bits drop.
        self.dropped_N = torch.mv(rounded_ND.add_(self.remainder_D).mul_(self.step), 0.5 - self.key_dither_D)
        self.mean_product_N = torch.mv(query_ND, self.mean_D)
        mean_length = float(torch.linalg.vector_norm(self.mean_D))
        self.mean_margin_N = torch.linalg.vector_norm(query_ND, dim=1) * (_ROUNDING * mean_length)

    def block(self, keys_MD: Tensor) -> Block:
        """See ``Filter``."""
        keys_MD = keys_MD.float().contiguous()
        count, width = keys_MD.shape
        reach_D, square_M = torch.empty(width), torch.empty(count)
        kernels.reach_and_lengths(*(x.numpy() for x in (keys_MD, self.mean_D, reach_D, square_M)))
        offset_M = square_M.mul_(-0.5 if self.with_offset else 0.0)
        offset, largest_offset = _centred(offset_M)
        # The columns of the offset hold it as long as a key's entries need no longer steps.
        largest = max(float((reach_D * self.balance_D).amax()), largest_offset / (self.columns * self.step * _LEVELS))
        step = max(largest, 1e-30) / _LEVELS
        quantized_MD, remainder_M, size = self._rounded(keys_MD, step)
        # The part of each key's products that the queries' rounding drops is one more offset.
        offset_M += remainder_M.mul_(step * self.step)
        unit = step * self.step * _LEVELS
        # The columns of an offset differ by one where need be: their sum is off by half a step at most.
        share_E = torch.arange(self.columns + 1) / self.columns
        parts_ME = ((offset_M / unit)[:, None] * share_E).round_().diff(dim=1)
        quantized_MD[:count, width : width + self.columns] = parts_ME.clamp_(-_LEVELS - 1, _LEVELS)
        dropped = float((offset_M - quantized_MD[:count, width : width + self.columns].sum(1) * unit).abs().amax())
        return Block(quantized_MD, count, step, size, offset, dropped)

    def _rounded(self, keys_MD: Tensor, step: float) -> tuple[Tensor, Tensor, float]:
        """Keys in 8 bits, their products with the remainders of the queries' rounding, and the longest's length."""
        count, width = keys_MD.shape
        quantized_MD = torch.zeros(
            -(-count // kernels.GROUP) * kernels.GROUP, self.quantized_ND.shape[1], dtype=torch.int8
        )
        # floor((key - mean) * balance / step + dither)
        factor_D = self.balance_D / step
        add_D, remainder_M = self.key_dither_D - self.mean_D * factor_D, torch.empty(count)
        arrays = (keys_MD, factor_D, add_D, self.remainder_D, quantized_MD, remainder_M)
        size = kernels.round_rows(*(x.numpy() for x in arrays))
        return quantized_MD, remainder_M, (math.sqrt(size) + 0.5 * math.sqrt(width)) * step

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """See ``Filter``."""
        torch._int_mm(self.quantized_ND[rows], block.quantized_MD.T, out=out_NM)

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """See ``Filter``."""
        size_N = self.size_N[rows]
        # q.k - q'.k' = q.(k - k') + (q - q').k': independent errors, so that the bound on their sum is that of a sum of
        # squares (see ``most_steps``); and what rounding to float32 adds.
        of_keys_N, of_queries = size_N * block.step, self.step * block.size
        margin_N = (of_keys_N.square() + of_queries**2).sqrt_() * self.most + size_N * (_ROUNDING * block.size)
        margin_N += self.mean_margin_N[rows] + (block.offset_error + _ROUNDING * abs(block.offset))
        shift_N = self.dropped_N[rows] * block.step + (self.mean_product_N[rows] + block.offset)
        return self.step * block.step, shift_N, margin_N


class FloatFilter:
    """Products in float32, or in bfloat16 where the CPU multiplies those fast."""

    def __init__(
        self, query_ND: Tensor, sample_MD: Tensor, *, with_offset: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        """See ``Int8Filter``."""
        self.with_offset, self.dtype = with_offset, dtype
        # The factors are multiplied as they are: here the balance only makes the bound closer.
        self.balance_D = balance(query_ND, sample_MD.float())
        self.size_N = torch.linalg.vector_norm(query_ND / self.balance_D, dim=1)
        # An offset is the sum of three narrow numbers, met by ones.
        ones = query_ND.new_ones(len(query_ND), 3 if with_offset else 0)
        self.quantized_ND = torch.cat([query_ND, ones], 1).to(dtype)
        self.rounding = _ROUNDING if dtype is torch.float32 else _BF16_ROUNDING

    def block(self, keys_MD: Tensor) -> Block:
        """See ``Filter``."""
        count, width = keys_MD.shape
        quantized_MD = self.quantized_ND.new_zeros(
            -(-count // kernels.GROUP) * kernels.GROUP, self.quantized_ND.shape[1]
        )
        quantized_MD[:count, :width] = keys_MD
        middle = largest = 0.0
        if self.with_offset:
            offset_M = -0.5 * squared_lengths(keys_MD)
            middle, largest = _centred(offset_M)
            for column in range(width, width + 3):
                quantized_MD[:count, column] = offset_M
                offset_M -= quantized_MD[:count, column].float()
        size = math.sqrt(float(squared_lengths(keys_MD, self.balance_D).amax()))
        offset_error = self.rounding * largest + _ROUNDING * abs(middle)
        return Block(quantized_MD, count, 1.0, size, middle, offset_error)

    def scores(self, block: Block, rows: slice, out_NM: Tensor) -> None:
        """See ``Filter``."""
        torch.mm(self.quantized_ND[rows], block.quantized_MD.T, out=out_NM)

    def bounds(self, block: Block, rows: slice) -> tuple[float, Tensor, Tensor]:
        """See ``Filter``."""
        # The last term is the rounding of the sum itself, which is no larger than what it sums.
        margin_N = (2 * self.rounding * block.size) * self.size_N[rows] + 2 * block.offset_error
        return 1.0, torch.full_like(margin_N, block.offset), margin_N


def _centred(offset_M: Tensor) -> tuple[float, float]:
    """Take the middle of the range off all offsets, in place; returns it, and the largest that is left."""
    middle = 0.5 * float(offset_M.amin() + offset_M.amax())
    return middle, float(offset_M.sub_(middle).abs().amax())


def balance(query_ND: Tensor, key_MD: Tensor) -> Tensor:
    """Factors for the keys' columns, whose inverse is for the queries': then both reach equally far in each column.

    Products stay as they are, and bounds on them made of lengths and largest entries are smallest.
    """
    key_D, query_D = (
        x.abs().amax(0).clamp_(min=1e-20) if len(x) else x.new_ones(x.shape[1]) for x in (key_MD, query_ND)
    )
    factor_D = (query_D / key_D).sqrt_()
    return factor_D / factor_D.log().mean().exp()


def squared_lengths(keys_MD: Tensor, factor_D: Tensor | None = None) -> Tensor:
    """Squared length of each row, its columns multiplied by the factors, (M,) float32."""
    parts = [part.float() for part in torch.split(keys_MD, _CHUNK_ROWS)]
    if factor_D is not None:
        parts = [part * factor_D for part in parts]
    return torch.cat([torch.linalg.vecdot(part, part) for part in parts])

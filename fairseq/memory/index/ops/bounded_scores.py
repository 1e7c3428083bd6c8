"""Approximate scores whose error is bounded: searches pass over all keys by them and look at few again.

Scores here are ``query . key``, for L2 minus half the squared distance, less what is the same for all keys of a query:
so all metrics are ranked alike, and neither a common offset of the keys nor long queries widen the bounds. With the
mean of the keys c, the mean of the queries (for L2, less c) m, and p = query - m (for L2, less c):

    score = p . (key - c) + m . (key - c) [- |key - c|^2 / 2 for L2] + what depends on the query alone

The second and third are a key's *bias*. In the first both are rounded; then it is

    a (s (raw + h) + w), within  size * width

with *raw* the product of the integers, a and s the steps of query and key, h and w what their rounding drops (they are
rounded down after adding a number that is drawn once per column, see ``dither``), *size* a key's length and *width*
how far a query's scores may be off for each unit of it.

Of fine entries in two parts (``tile_loop_kernels``) raw lacks the products of second parts y and z of query and key.
Each is cut off around a *shift* that is drawn once per column, e and f: then y - e and z - f are as good as drawn by
chance, too, and

    y z = (y - e) (z - f) + e z + y f - e f

where the first is bounded as rounding errors are, and the others belong to w and h.

Shapes: N queries, M keys of a block, D width, E columns (D, filled up).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.ops import kernels
from fairseq.memory.index.ops.products import Products
from fairseq.memory.types import Array

# A float32 product of vectors is off by a few units in the seventh place of their lengths.
_ROUNDING = 2e-6
_BF16_ROUNDING = 1.5 * 2.0**-8 + 2.0**-15  # of both factors, and of the product; bounds have twice that
# A mean that is not so many times as long as keys are apart is left on keys that are multiplied in float32: taking it
# off costs a third of their products with 512 queries, and the bounds are close enough with it.
_SMALL_MEAN = 4.0
_SURE = 1.01  # sums of remainders are taken in float32
_LEAST_REACH = 1e-6  # of a column, to that of the largest
_MOST_REST = 20.0  # of -31.5 to 31.5, whose squares are 341 in the mean


@dataclass(frozen=True)
class KeyBlock:
    """Keys as they are multiplied, filled up to whole groups by keys that no score reaches."""

    keys: Tensor
    """As ``Products`` takes them."""
    num_rows: int
    start_M: Array
    """int32, what raw products begin with."""
    about_5M: Array
    """float32: step, weight, size, bias (with the slack), slack of each key."""
    memory: Tensor
    """What ``keys`` was made in."""

    @property
    def columns(self) -> int:
        """Columns of scores."""
        return int(self.about_5M.shape[1])

    def drop(self, rows_M: Array) -> None:
        """Let no score reach these rows of the block."""
        self.about_5M[3, rows_M] = -np.inf


class Rounding:
    """What queries and keys are rounded by; all that are made by one can be multiplied with each other."""

    def __init__(self, query_ND: Tensor, apart_MD: Tensor, products: Products, *, by_distance: bool) -> None:
        """Args.

        query_ND: float32, the queries or others like them: their mean is taken off, and their ranges, with those of
            ``apart_MD``, decide how steps are shared out.
        apart_MD: some keys less the mean that is taken off them.
        """
        self.products, self.by_distance = products, by_distance
        self.width = query_ND.shape[1]
        self.centre_D = query_ND.mean(0) if len(query_ND) else torch.zeros(self.width)
        self.balance_D = balance(query_ND - self.centre_D, apart_MD)
        key_dither_D, query_dither_D = torch.split(dither(2 * self.width), self.width)
        self._own_D, self._other_D = 0.5 - key_dither_D, 0.5 - query_dither_D
        self._shift_2D = shifts(self.width if products.has_parts else 0)
        self.ratio = 1e-20
        if products.is_rounded:
            balanced_MD = apart_MD * self.balance_D
            length_M = torch.linalg.vector_norm(balanced_MD, dim=1).clamp_(min=1e-20)
            # Any ratio bounds the errors; that of most keys bounds them closely.
            ratio_M = balanced_MD.abs().amax(1) / (products.levels * length_M)
            if products.longest:
                ratio_M.clamp_(min=1.0 / products.longest)
            self.ratio = max(float(ratio_M.median()) if len(ratio_M) else 0.0, 1e-20)
        # The length of second parts less their shifts, in steps, over a key's length: that of most keys, too.
        self._rest = self.ratio * _MOST_REST * math.sqrt(self.width)

    def about_keys(self, mean_D: Tensor) -> Array:
        """What kernels round keys by from which this mean is taken off, (5, D)."""
        linear_D = self.centre_D - mean_D if self.by_distance else self.centre_D
        return torch.stack((mean_D, self.balance_D, linear_D, self._own_D, self._other_D)).numpy()

    def round_keys(self, keys_MD: Array, mean_D: Tensor, key_B: Array, start_M: Array) -> Array:
        """Write the integers of keys, and what their products begin with. Returns: ``about_5M``.

        Args:
            keys_MD: as ``kernel_rows`` makes them.
            key_B: room for so many keys as ``start_M`` has, which may be more: no score reaches those.
        """
        from fairseq.memory.index.ops import rounding_kernels

        about_5M = np.zeros((5, len(start_M)), np.float32)
        about_5M[3, len(keys_MD) :] = -np.inf
        products, columns = self.products, self.products.columns(self.width)
        size = (np.float32(products.levels), np.float32(products.longest))
        key_B[max(0, len(key_B) - kernels.GROUP * columns) :] = 0  # the last group may have places without a key
        rounding_kernels.round_keys(
            keys_MD, self.about_keys(mean_D), self._shift_2D, columns, *size, np.float32(self.ratio),
            np.float32(self._rest), self.by_distance, products.zero, products.is_interleaved, key_B, start_M, about_5M,
        )  # fmt: skip
        return about_5M

    def round_queries(self, query_ND: Tensor) -> tuple[Tensor, Array]:
        """Integers of queries, with so many rows of zeros behind them as a tile has, and what is known of them.

        Returns: int8 (N + tile rows, E), and step, remainder, width, 0 of each query, float32 (N, 4).
        """
        from fairseq.memory.index.ops import rounding_kernels
        from fairseq.memory.index.ops.tile_loop_kernels import FINE

        products, count = self.products, len(query_ND)
        # A tile that begins at the last row reads on behind it.
        rows_NE = torch.zeros(count + products.tile_rows, products.columns(self.width), dtype=torch.int8)
        nothing_D = torch.zeros(self.width)
        rows = (self.centre_D, 1.0 / self.balance_D, nothing_D, self._other_D, self._own_D)
        about_N3, size = np.empty((count, 3), np.float32), (np.float32(products.levels), np.float32(products.longest))
        given = (np.ascontiguousarray(query_ND.numpy()), torch.stack(rows).numpy(), self._shift_2D[::-1].copy())
        rounding_kernels.round_queries(*given, *size, products.zero, rows_NE[:count].numpy(), about_N3)
        step_N, length_N = about_N3[:, 0], about_N3[:, 2]
        about_N4 = np.zeros((count, 4), np.float32)
        about_N4[:, :2] = about_N3[:, :2]
        # q.k - q'.k' = q.(k - k') + (q - q').k': independent errors, so that the bound on their sum is that of a sum of
        # squares (see ``most_steps``); and what rounding to float32 adds.
        errors = [length_N * np.float32(self.ratio), step_N]
        if products.has_parts:
            errors.append(step_N * np.float32(FINE * self._rest))
        together_N = np.linalg.norm(np.stack(errors).astype(np.float64), axis=0)  # of tiny ones float32 has no squares
        about_N4[:, 2] = _SURE * most_steps(self.width, len(errors)) * together_N + _ROUNDING * length_N
        return rows_NE, about_N4


class RoundedQueries:
    """Queries as they are multiplied with blocks of keys, and how far from the truth their scores may be."""

    def __init__(
        self,
        query_ND: Tensor,
        sample_MD: Tensor,
        products: Products,
        *,
        by_distance: bool,
        rounding: Rounding | None = None,
    ) -> None:
        """Args.

        query_ND: float32.
        sample_MD: some keys; their mean and ranges decide what is taken off, and how steps are shared out between
            queries and keys.
        rounding: that of other queries, for blocks that were rounded by it.
        """
        self.products, self.by_distance = products, by_distance
        self._mean_D = sample_MD.float().mean(0)
        if rounding is None:
            rounding = Rounding(query_ND, sample_MD.float() - self._mean_D, products, by_distance=by_distance)
        self.rounding = rounding
        self.width = query_ND.shape[1]
        moved_ND = query_ND - self._mean_D if by_distance else query_ND
        self._length_N = torch.linalg.vector_norm(moved_ND, dim=1, dtype=torch.float64).float()
        # What scores of the metric are more than scores here.
        self._shift_N = -0.5 * self._length_N.square() if by_distance else torch.mv(query_ND, self._mean_D)
        mean_length = float(torch.linalg.vector_norm(self._mean_D))
        self._slack_N = self._length_N.square() if by_distance else self._length_N * (2.0 * mean_length)
        if products.is_rounded:
            self.rows, self.about_N4 = self.rounding.round_queries(query_ND)
            """``about_N4``: step, remainder, width, and the score that a key has to reach (written by searches)."""
            return
        centred_ND = query_ND - self.rounding.centre_D
        balanced_ND = centred_ND / self.rounding.balance_D
        length_N = torch.linalg.vector_norm(balanced_ND, dim=1, dtype=torch.float64).float()
        error = _ROUNDING + (_BF16_ROUNDING if products.dtype is torch.bfloat16 else 0.0)
        self.rows = centred_ND.to(products.dtype)
        self.about_N4 = np.zeros((len(query_ND), 4), np.float32)
        self.about_N4[:, 0], self.about_N4[:, 2] = 1.0, 2.0 * error * length_N.numpy()
        apart = float(torch.linalg.vector_norm(sample_MD - self._mean_D, dim=1).median())
        self._keeps_mean = products.dtype is torch.float32 and mean_length <= _SMALL_MEAN * apart
        if self._keeps_mean:
            self.about_N4[:, 1] = -torch.mv(centred_ND, self._mean_D).numpy()

    def block(self, keys_MD: Tensor | Array, old: KeyBlock | None = None) -> KeyBlock:
        """Make keys ready to be multiplied.

        Args:
            keys_MD: of any floating type, or as ``kernel_rows`` makes them.
            old: a block that is not needed any more, whose memory is used if it is as large.
        """
        from fairseq.memory.index.ops import rounding_kernels

        rows_MD = kernel_rows(keys_MD) if isinstance(keys_MD, Tensor) else keys_MD
        count = len(rows_MD)
        filled = -(-max(1, count) // kernels.GROUP) * kernels.GROUP
        columns = self.products.columns(self.width)
        memory = old.memory if old is not None and old.columns == filled else None
        if self.products.is_rounded:
            start_M = np.zeros(filled, np.int32)
            key_B = torch.empty(filled * columns, dtype=torch.int8) if memory is None else memory
            about_5M = self.rounding.round_keys(rows_MD, self._mean_D, key_B.numpy(), start_M)
            return KeyBlock(self.products.keys(key_B, columns), count, start_M, about_5M, key_B)
        about_5M = np.zeros((5, filled), np.float32)
        about_5M[3, count:] = -np.inf
        float_MD = torch.empty(filled, columns) if memory is None else memory
        float_MD[count:] = 0.0
        given = (self.rounding.about_keys(self._mean_D), self.by_distance, self._keeps_mean)
        rounding_kernels.centre_keys(rows_MD, *given, float_MD[:count].numpy(), about_5M)
        return KeyBlock(float_MD.to(self.products.dtype), count, np.zeros(filled, np.int32), about_5M, float_MD)

    def raw_scores(self, block: KeyBlock, rows: slice, out_NM: Tensor) -> None:
        """Write the raw products of some queries with a block: int32 if they are rounded."""
        self.products.multiply(self.rows[rows], block.keys, block.start_M, out_NM)

    def least_of(self, score_Q: Tensor, rows: slice) -> Tensor:
        """Scores here that keys with these scores of the metric have at least."""
        half = 0.5 if self.by_distance else 1.0
        slack_Q = _ROUNDING * (self._slack_N[rows] + score_Q.abs())
        least_Q: Tensor = half * score_Q - self._shift_N[rows] - slack_Q
        return least_Q


def kernel_rows(keys_MD: Tensor) -> Array:
    """Keys of any floating type as kernels take them: those of 16 bits as they are, where the CPU knows float16.

    Returns: float32, or the bits of float16 as uint16 or of bfloat16 as int16 (``half_kernels``).
    """
    from fairseq.memory.index.ops.half_kernels import READS_FLOAT16

    rows_MD = keys_MD.contiguous()
    if rows_MD.dtype is torch.bfloat16:
        bits: Array = rows_MD.view(torch.int16).numpy()
        return bits
    if rows_MD.dtype is torch.float16 and READS_FLOAT16:
        return np.asarray(rows_MD.view(torch.int16).numpy().view(np.uint16))
    rows: Array = rows_MD.float().numpy()
    return rows


def balance(query_ND: Tensor, key_MD: Tensor) -> Tensor:
    """Factors for the keys' columns, whose inverse is for the queries': then both reach equally far in each column.

    Products stay as they are, and bounds on them made of lengths and largest entries are smallest.
    """
    key_D, query_D = (x.abs().amax(0) if len(x) else x.new_ones(x.shape[1]) for x in (key_MD, query_ND))
    for reach_D in (key_D, query_D):  # a column without any number here may have some elsewhere
        reach_D.clamp_(min=max(1e-20, _LEAST_REACH * float(reach_D.max())))
    factor_D = (query_D / key_D).sqrt_()
    return factor_D / factor_D.log().mean().exp()


def dither(width: int) -> Tensor:
    """One number per column, uniform in [0, 1), always the same."""
    return torch.rand(width, generator=torch.Generator().manual_seed(width))


def shifts(width: int) -> Array:
    """Where second parts of fine entries of keys and of queries are cut off: twice that, less one, int16 (2, width).

    Of each column one of -32 to 31, drawn by chance, always the same.
    """
    drawn_2D = torch.randint(-32, 32, (2, width), generator=torch.Generator().manual_seed(width))
    return (2 * drawn_2D - 1).to(torch.int16).numpy()


def most_steps(width: int, parts: int = 2) -> float:
    """Bound on the sum of the errors of so many rounded vectors, in steps: those of each, squared and summed.

    Rounding x as ``floor(x + u) + 1/2 - u``, u drawn once per column, makes errors that are uniform, independent and of
    mean zero whatever x is, unless x was made for these u. A sum of them in some direction beyond this many steps has a
    chance of 1e-15; half a step times the root of the width is never passed by one vector.
    """
    return min(math.sqrt(2 * math.log(2e15) / 12), 0.5 * math.sqrt(parts * width))

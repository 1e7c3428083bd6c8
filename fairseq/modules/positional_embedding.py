"""Embeddings of positions, learned or sinusoidal. Shapes: B batch, T time, D width.

As in fairseq, the first token has position ``pad + 1`` and padding position ``pad``, whose vector is zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def positions_of(tokens_BT: Tensor, pad: int, before_B: Tensor | None = None) -> Tensor:
    """Position of each token, counting those that are no padding, (B, T).

    Args:
        before_B: tokens of each row that were read in earlier steps.
    """
    is_word_BT = tokens_BT != pad
    counted_BT = is_word_BT.cumsum(1)
    if before_B is not None:
        counted_BT = counted_BT + before_B[:, None]
    return counted_BT * is_word_BT + pad


class LearnedPositionalEmbedding(nn.Embedding):
    """A learned vector per position, up to a longest text."""

    def __init__(self, max_positions: int, width: int, pad: int) -> None:
        super().__init__(max_positions + pad + 1, width, padding_idx=pad)
        self.max_positions = max_positions

    def reset_parameters(self) -> None:
        """Draw the initial vectors; padding's is zero."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        nn.init.zeros_(self.weight[self.padding_idx])

    def forward(self, tokens_BT: Tensor, before_B: Tensor | None = None, num_before: int = 0) -> Tensor:
        """Vectors for the positions of these tokens, (B, T, D).

        Raises: ValueError when the text is longer than the positions that were learned.
        """
        length = num_before + tokens_BT.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"a text of {length} tokens is longer than the {self.max_positions} positions this model has learned; "
                "give a smaller --tokens-per-sample or --context-window"
            )
        assert self.padding_idx is not None
        return super().forward(positions_of(tokens_BT, self.padding_idx, before_B))


class SinusoidalPositionalEmbedding(nn.Module):
    """Sines and cosines of geometrically spaced wavelengths (arXiv 1706.03762, sec. 3.5), all sines first."""

    def __init__(self, max_positions: int, width: int, pad: int) -> None:
        super().__init__()
        self.width = width
        self.pad = pad
        self.max_positions = max_positions
        self._float_tensor: Tensor
        self.register_buffer("_float_tensor", torch.zeros(1))  # fairseq's files have one; it means nothing
        # The table is made on first use and not a buffer: it would be rounded when a model turns to half precision
        # before longer texts make it grow.
        self._table_PD = torch.empty(0, width)

    def forward(self, tokens_BT: Tensor, before_B: Tensor | None = None, num_before: int = 0) -> Tensor:
        """Vectors for the positions of these tokens, (B, T, D), in the model's precision."""
        needed = self.pad + 1 + num_before + tokens_BT.shape[1]
        like = self._float_tensor
        if (
            self._table_PD.shape[0] < needed
            or self._table_PD.device != like.device
            or self._table_PD.dtype != like.dtype
        ):
            size = max(needed, self.pad + 1 + self.max_positions)
            with torch.inference_mode(False):  # training may continue with a table that validation made
                self._table_PD = sinusoids(size, self.width, self.pad).to(like)
        return F.embedding(positions_of(tokens_BT, self.pad, before_B), self._table_PD)


def sinusoids(num_positions: int, width: int, pad: int) -> Tensor:
    """The table of vectors, (positions, width) in float32, with zeros for padding's."""
    half = width // 2
    # float32 throughout, as in the programs whose checkpoints are read: angles of late positions depend on it.
    rate_H = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / max(half - 1, 1)))
    angle_PH = torch.arange(num_positions, dtype=torch.float32)[:, None] * rate_H
    table_PD = torch.cat([angle_PH.sin(), angle_PH.cos(), torch.zeros(num_positions, width % 2)], dim=1)
    table_PD[pad] = 0
    return table_PD

"""The mean loss of a text, per token or per word of several pieces: sums that parts of a text are added up by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq.metrics.training import perplexity

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LossSums:
    """Sums from which the mean loss of some scored tokens is computed."""

    nats: float = 0.0
    """Sum of -ln p over the tokens that are not impossible."""
    num_tokens: int = 0
    """Tokens scored."""
    num_counted: int = 0
    """Divisor of the mean: tokens that are not impossible, less pieces that a following piece continues."""
    num_impossible: int = 0
    """Tokens of probability 0, which are dropped: their mean has no meaning."""

    def plus(self, other: LossSums) -> LossSums:
        """The sums over both texts."""
        return LossSums(
            self.nats + other.nats,
            self.num_tokens + other.num_tokens,
            self.num_counted + other.num_counted,
            self.num_impossible + other.num_impossible,
        )

    @property
    def loss_base2(self) -> float:
        """Mean -log2 p; infinity where nothing is counted."""
        return self.nats / self.num_counted / math.log(2) if self.num_counted else math.inf

    @property
    def perplexity(self) -> float:
        """2 to the loss."""
        return perplexity(self.loss_base2)


def loss_sums(block_N: Array, continues_N: Array, logp_N: Array) -> LossSums:
    """The sums over scored tokens, those of one block next to each other and in the order of the text.

    Args:
        block_N: number of the block each token stands in.
        continues_N: bool, True for a piece that the following one continues.
        logp_N: float64 ln p.
    """
    impossible_N = np.isneginf(logp_N)
    num_impossible = int(impossible_N.sum())
    if num_impossible:
        block_N, continues_N, logp_N = block_N[~impossible_N], continues_N[~impossible_N], logp_N[~impossible_N]
    counted = len(logp_N) - int(joined(block_N, continues_N).sum())
    return LossSums(-float(logp_N.sum()), len(impossible_N), counted, num_impossible)


def joined(block_N: Array, continues_N: Array) -> Array:
    """True for pieces whose score goes to the next piece; a block's last token keeps its own."""
    last_N = np.ones(len(block_N), dtype=bool)
    last_N[:-1] = block_N[1:] != block_N[:-1]
    return continues_N & ~last_N

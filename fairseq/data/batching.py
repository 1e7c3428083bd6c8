"""Grouping of blocks into batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.config import require_at_least

IntArray = npt.NDArray[np.integer[Any]]


class Blocks:
    """What batching needs of blocks of one text, from their sizes alone."""

    unit = "block"

    @property
    def sizes(self) -> IntArray:
        """Scored tokens of each block."""
        raise NotImplementedError

    def order(self, seed: int, *, shuffle: bool) -> npt.NDArray[np.int64]:
        """Numbers of the blocks by length; equals in an order drawn from the seed, or that of the text."""
        order = np.random.default_rng(seed).permutation(len(self.sizes)) if shuffle else np.arange(len(self.sizes))
        return order[np.argsort(self.sizes[order], kind="stable")]

    def fits(self, max_positions: int) -> npt.NDArray[np.bool_]:
        """True for the blocks of at most so many tokens."""
        fits: npt.NDArray[np.bool_] = self.sizes <= max_positions
        return fits

    def lengths(self, i: int) -> str:
        """Length of a block, in words."""
        return f"{self.sizes[i]} tokens"

    def limits(self, max_positions: int) -> str:
        """Longest block that a model reads, in words."""
        return str(max_positions)


def filter_by_size(indices: IntArray, sizes: IntArray, max_positions: int | None) -> tuple[IntArray, IntArray]:
    """Split ``indices`` into blocks of at most ``max_positions`` tokens and longer ones; both keep their order."""
    if max_positions is None:
        return indices, indices[:0]
    fits = sizes[indices] <= max_positions
    return indices[fits], indices[~fits]


def batch_by_size(
    indices: IntArray,
    sizes: IntArray,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    unit: str = "block",
) -> list[npt.NDArray[np.int64]]:
    """Cut ``indices``, in their order, into batches.

    A batch is full when one more block would make it cost more than ``max_tokens`` (its longest block times its number
    of blocks) or hold more than ``max_sentences``. A full batch passes the blocks beyond a multiple of
    ``required_batch_size_multiple`` on to the next one.

    Raises: ValueError without a limit, or for a single block above it.
    """
    if max_tokens is None and max_sentences is None:
        raise ValueError(
            "neither --max-tokens nor --max-sentences limits a batch; give --max-tokens or --max-sentences"
        )
    require_at_least(1, max_tokens=max_tokens, max_sentences=max_sentences)
    order = np.asarray(indices, dtype=np.int64)
    lengths = np.asarray(sizes)[order]
    if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
        worst = int(lengths.argmax())
        raise ValueError(
            f"{unit} {order[worst]} has {lengths[worst]} tokens, more than --max-tokens {max_tokens}; "
            "raise --max-tokens" + (" or make blocks shorter (--tokens-per-sample)" if unit == "block" else "")
        )
    edges = _edges(lengths.tolist(), max_tokens, max_sentences, max(1, required_batch_size_multiple))
    return [order[start:end] for start, end in zip(edges, edges[1:])]


def _edges(lengths: list[int], max_tokens: int | None, max_sentences: int | None, multiple: int) -> list[int]:
    tokens = max_tokens if max_tokens is not None else sum(lengths) * len(lengths)
    sentences = max_sentences if max_sentences is not None else len(lengths)
    edges = [0]
    start, longest = 0, 0
    for position, length in enumerate(lengths):
        if length > longest:
            longest = length
        count = position - start
        # More than one cut: blocks carried over may be too many for a batch with a longer block.
        while count and (count >= sentences or (count + 1) * longest > tokens):
            start += count - count % multiple if count > multiple else count
            edges.append(start)
            count = position - start
            longest = max(lengths[start : position + 1])
    return [*edges, len(lengths)] if lengths else [0]

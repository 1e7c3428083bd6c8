"""Grouping of blocks into batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.config import require_at_least

IntArray = npt.NDArray[np.integer[Any]]


def filter_by_size(indices: IntArray, sizes: IntArray, max_positions: int | None) -> tuple[IntArray, IntArray]:
    """Part ``indices`` into those of at most ``max_positions`` tokens and the longer ones; both keep their order."""
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
) -> list[npt.NDArray[np.int64]]:
    """Cut ``indices``, in their order, into batches.

    A batch is full when one more block would make it cost more than ``max_tokens`` (its longest block times its number
    of blocks) or hold more than ``max_sentences``. A full batch gives what is over a multiple of
    ``required_batch_size_multiple`` to the next one.

    Raises: ValueError when there is no limit, or for a block that alone is over it.
    """
    if max_tokens is None and max_sentences is None:
        raise ValueError("give --max-tokens or --max-sentences: nothing else limits a batch")
    require_at_least(1, max_tokens=max_tokens, max_sentences=max_sentences)
    order = np.asarray(indices, dtype=np.int64)
    lengths = np.asarray(sizes)[order]
    if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
        worst = int(lengths.argmax())
        raise ValueError(
            f"block {order[worst]} has {lengths[worst]} tokens, more than --max-tokens {max_tokens}; "
            "raise --max-tokens or make blocks shorter (--tokens-per-sample)"
        )
    edges = _edges(lengths.tolist(), max_tokens, max_sentences, max(1, required_batch_size_multiple))
    return [order[start:end] for start, end in zip(edges, edges[1:])]


def _edges(lengths: list[int], max_tokens: int | None, max_sentences: int | None, multiple: int) -> list[int]:
    tokens = max_tokens if max_tokens is not None else sum(lengths) * len(lengths)
    sentences = max_sentences if max_sentences is not None else len(lengths)
    edges = [0]
    start, longest = 0, 0
    for place, length in enumerate(lengths):
        if length > longest:
            longest = length
        count = place - start
        # More than one cut: what was carried over may be too much beside a longer block.
        while count and (count >= sentences or (count + 1) * longest > tokens):
            start += count - count % multiple if count > multiple else count
            edges.append(start)
            count = place - start
            longest = max(lengths[start : place + 1])
    return [*edges, len(lengths)] if lengths else [0]

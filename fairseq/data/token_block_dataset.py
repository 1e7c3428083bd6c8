"""A stream of sentences cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
BREAK_MODES = ("none", "complete", "complete_doc", "eos")


class TokenBlockDataset:
    """Blocks as slices of a flat token stream: block ``i`` is ``tokens[starts[i] : starts[i] + sizes[i]]``.

    Break modes:
        none: blocks of ``block_size`` tokens, the last one possibly shorter.
        complete: whole sentences, as many as fit ``block_size``; a longer sentence is a longer block.
        complete_doc: as complete, but a document separator (a sentence of one token) ends the block and is dropped.
        eos: one sentence per block.
    """

    def __init__(self, tokens: IntArray, sizes: IntArray, block_size: int | None, break_mode: str = "none") -> None:
        """Cut the stream ``tokens`` of sentences with these ``sizes``; ``block_size`` may be None for eos.

        Raises: ValueError for an unknown mode or a block size below 1.
        """
        if break_mode not in BREAK_MODES:
            raise ValueError(f"unknown --sample-break-mode {break_mode!r}; choose one of {', '.join(BREAK_MODES)}")
        if break_mode != "eos" and (block_size is None or block_size < 1):
            raise ValueError(f"--sample-break-mode {break_mode} needs blocks of at least 1 token, got {block_size}")
        total = int(sizes.sum(dtype=np.int64))
        if total != len(tokens):
            raise ValueError(f"sentences of {total} tokens in a stream of {len(tokens)}; run preprocess.py again")
        self.tokens = tokens
        self.starts, self.sizes = cut(sizes, block_size, break_mode)
        self._break_mode, self._unsplit = break_mode, (self.starts, self.sizes)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """The tokens of block ``i``."""
        if not 0 <= i < len(self.starts):
            raise IndexError(f"block {i} of {len(self.starts)}")
        start = int(self.starts[i])
        return self.tokens[start : start + int(self.sizes[i])].astype(np.int64)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return (self[i] for i in range(len(self)))

    @property
    def document_unit(self) -> str:
        """Unit of a document: the whole ``text``, a ``document`` between separators, or a ``block``."""
        return {"none": "text", "complete_doc": "document"}.get(self._break_mode, "block")

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Start of each document in the stream."""
        starts, sizes = self._unsplit
        if self.document_unit == "text":
            return np.zeros(1, dtype=np.int64)
        if self.document_unit == "block":
            return starts
        # A separator is in no block: a gap between two blocks ends a document.
        first = np.ones(len(starts), dtype=np.bool_)
        first[1:] = starts[1:] != starts[:-1] + sizes[:-1]
        return starts[np.flatnonzero(first)]

    def split(self, longest: int) -> TokenBlockDataset:
        """The same text with every block of more than ``longest`` tokens cut into blocks of that size."""
        num_blocks = -(-self.sizes // longest)
        block = np.repeat(np.arange(len(self)), num_blocks)
        offset = (np.arange(len(block)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)) * longest
        result = object.__new__(TokenBlockDataset)
        result.tokens = self.tokens
        result._break_mode, result._unsplit = self._break_mode, self._unsplit
        result.starts = self.starts[block] + offset
        result.sizes = np.minimum(self.sizes[block] - offset, longest)
        return result


def cut(
    sizes: IntArray, block_size: int | None, break_mode: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and sizes of the blocks of a stream of sentences with these sizes."""
    sentences = sizes[sizes > 0].astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(sentences)])
    if break_mode == "eos":
        return edges[:-1], sentences
    assert block_size is not None
    if break_mode == "none":
        starts = np.arange(0, edges[-1], block_size)
        return starts, np.minimum(edges[-1] - starts, block_size)
    # The end of a block that begins with sentence i, for all i at once; the walk below only looks them up.
    count = len(sentences)
    end = np.searchsorted(edges, edges[:-1] + block_size, side="right") - 1
    end = np.maximum(end, np.arange(1, count + 1))
    if break_mode == "complete_doc":
        separators = np.append(np.flatnonzero(sentences == 1), count)
        end = np.minimum(end, separators[np.searchsorted(separators, np.arange(count))])
    first, after = _walk(end.tolist())
    return edges[first], edges[after] - edges[first]


def _walk(end: list[int]) -> tuple[list[int], list[int]]:
    """First sentence of each block and the one after its last; ``end[i] == i`` marks a sentence to drop."""
    first, after = [], []
    i, count = 0, len(end)
    while i < count:
        if (stop := end[i]) == i:
            i += 1
            continue
        first.append(i)
        after.append(stop)
        i = stop
    return first, after

"""Blocks preceded by the text before them, for evaluation with a context window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fairseq.data.monolingual_dataset import MonolingualDataset, Tokens, pad_rows
from fairseq.data.types import LMBatch


class LMContextWindowDataset:
    """Each block with up to ``context_window`` tokens of the blocks before it, which are read but not scored.

    The text a model sees is that of the *kept* blocks: one that is dropped as too long is context for none. Where
    blocks begin with <s>, it stands before each block of the context and between context and block, as in fairseq.
    Calls keep no state, so blocks can be requested in any order and by any process.
    """

    def __init__(self, dataset: MonolingualDataset, kept: npt.ArrayLike, context_window: int, max_len: int) -> None:
        """Serve the blocks ``kept`` of ``dataset``.

        Args:
            kept: numbers of the blocks that are evaluated; rising.
            context_window: largest number of context tokens of a row.
            max_len: longest row; a long block gets less context.
        """
        self.dataset = dataset
        self.context_window = context_window
        self.max_len = max_len
        self._kept = np.asarray(kept, dtype=np.int64)
        assert (np.diff(self._kept) > 0).all(), "kept blocks are not in the order of the text"
        # Edges of the kept blocks, <s> included, in the text that consists of them alone.
        self._bos: Tokens = np.array([] if dataset.bos is None else [dataset.bos], dtype=np.int64)
        self._edges = np.concatenate([[0], np.cumsum(dataset.sizes[self._kept] + len(self._bos))])

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Scored tokens of each block of the underlying data set, by block number."""
        return self.dataset.sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def context(self, i: int) -> Tokens:
        """The context tokens of block ``i``."""
        return self._before(i, self.dataset.source, self._bos)

    def places(self, indices: npt.ArrayLike) -> list[Tokens]:
        """For each of these blocks, the place of the token that each position of its row predicts; -1 for none."""
        if not self.context_window:
            return self.dataset.places(indices)
        nowhere, place = np.full(len(self._bos), -1), self.dataset.place
        numbers = np.asarray(indices, np.int64).tolist()
        return [np.concatenate([self._before(i, place, nowhere), nowhere, place(i)]) for i in numbers]

    def _before(self, i: int, of_block: Callable[[int], Tokens], of_bos: Tokens) -> Tokens:
        """The context of block ``i``, put together from what each block has there."""
        position = int(np.searchsorted(self._kept, i))
        if position == len(self._kept) or self._kept[position] != i:
            raise IndexError(f"block {i} is not among the {len(self._kept)} kept blocks")
        end = int(self._edges[position])
        room = self.max_len - int(self.sizes[i]) - len(self._bos)
        start = end - max(0, min(self.context_window, room, end))
        if start == end:
            return np.empty(0, dtype=np.int64)
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        parts = [(of_bos, of_block(block)) for block in self._kept[first:position].tolist()]
        return np.concatenate([tokens for part in parts for tokens in part])[start - end :]

    def collate(self, indices: npt.ArrayLike) -> LMBatch:
        """The batch of these blocks, by their number in the underlying data set."""
        if not self.context_window:
            return self.dataset.collate(indices)
        ids = np.asarray(indices, dtype=np.int64)
        source, target = self.dataset.source, self.dataset.target
        context = ((np.concatenate([self.context(i), self._bos]), source(i), target(i)) for i in ids.tolist())
        return pad_rows(ids, context, self.dataset.pad)

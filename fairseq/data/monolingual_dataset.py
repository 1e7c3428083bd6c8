"""Blocks of one text as batches for next-token prediction."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fairseq.data.batching import Blocks
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.data.types import LMBatch

Tokens = npt.NDArray[np.int64]


class MonolingualDataset(Blocks):
    """Blocks where each token is predicted from those before it.

    A block's first token is predicted from the token before the block in the text (</s> where the text begins).
    """

    def __init__(self, blocks: TokenBlockDataset, pad: int, eos: int, bos: int | None = None) -> None:
        """Serve ``blocks``; with ``bos``, each input begins with that token, whose own prediction is not scored."""
        self.blocks = blocks
        self.pad = pad
        self.eos = eos
        self.bos = bos

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Scored tokens of each block."""
        return self.blocks.sizes

    def __len__(self) -> int:
        return len(self.blocks)

    def target(self, i: int) -> Tokens:
        """The tokens of block ``i``."""
        return self.blocks[i]

    def source(self, i: int) -> Tokens:
        """Inputs that predict them: the block shifted right by one."""
        start = int(self.blocks.starts[i])
        size = int(self.blocks.sizes[i])
        if start > 0:
            return self.blocks.tokens[start - 1 : start - 1 + size].astype(np.int64)
        # Converted first: joined with an int64, uint64 becomes float64.
        return np.concatenate([[self.eos], self.blocks.tokens[: size - 1].astype(np.int64)])

    def place(self, i: int) -> Tokens:
        """Places in the text of the tokens of block ``i``, which its positions predict."""
        start = int(self.blocks.starts[i])
        return np.arange(start, start + int(self.blocks.sizes[i]))

    def places(self, indices: npt.ArrayLike) -> list[Tokens]:
        """For each of these blocks, the place of the token that each position of its row predicts; -1 for none."""
        nowhere = np.full(0 if self.bos is None else 1, -1)
        return [np.concatenate([nowhere, self.place(i)]) for i in np.asarray(indices, np.int64).tolist()]

    def with_long_blocks_split(self, longest: int) -> MonolingualDataset:
        """The same text, no block longer than ``longest``."""
        result = copy.copy(self)
        result.blocks = self.blocks.split(longest)
        return result

    def collate(self, indices: npt.ArrayLike) -> LMBatch:
        """The batch of these blocks."""
        context = np.array([] if self.bos is None else [self.bos], dtype=np.int64)
        ids = np.asarray(indices, dtype=np.int64)
        return pad_rows(ids, ((context, self.source(i), self.target(i)) for i in ids.tolist()), self.pad)


def pad_rows(ids: npt.NDArray[np.int64], rows: Iterable[tuple[Tokens, Tokens, Tokens]], pad: int) -> LMBatch:
    """A batch of rows (context, source, target): the context is read before the source and not scored."""
    parts: Sequence[tuple[Tokens, Tokens, Tokens]] = list(rows)
    if not parts:
        return LMBatch.empty()
    width = max(len(context) + len(source) for context, source, _ in parts)
    tokens_BT = np.full((len(parts), width), pad, dtype=np.int64)
    target_BT = np.full((len(parts), width), pad, dtype=np.int64)
    scored_BT: npt.NDArray[Any] = np.zeros((len(parts), width), dtype=np.bool_)
    for row, (context, source, target) in enumerate(parts):
        first, end = len(context), len(context) + len(source)
        tokens_BT[row, :first] = context
        tokens_BT[row, first:end] = source
        target_BT[row, first:end] = target
        scored_BT[row, first:end] = True
    num_scored = sum(len(source) for _, source, _ in parts)
    tensor = torch.from_numpy
    return LMBatch(tensor(ids), tensor(tokens_BT), tensor(target_BT), tensor(scored_BT), num_scored)

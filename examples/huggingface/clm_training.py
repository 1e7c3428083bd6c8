"""Samples to train causal language models on: windows that follow one another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_IGNORED = -100


class Blocks(torch.utils.data.Dataset):
    """Groups of tokens, cut into pieces of at most ``size``."""

    def __init__(self, groups: Sequence[Tensor], size: int, most: int | None, *, tails: bool) -> None:
        pieces = (piece for ids in groups for piece in torch.split(ids, size) if len(piece) > 1)
        self.pieces = list(itertools.islice((p for p in pieces if tails or len(p) == size), most))
        if not self.pieces:
            raise ValueError(f"the text to train on is shorter than a window of {size} tokens; give a smaller one")

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[number].long()}


class Padding:
    """Makes a batch of pieces: shorter ones are padded on the right, and padding is nothing to learn."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The batch, by the names of the model's parameters."""
        ids = [piece["input_ids"] for piece in pieces]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        is_text = torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in ids])[:, None]
        labels = padded.masked_fill(~is_text, _IGNORED)
        return {"input_ids": padded, "attention_mask": is_text.long(), "labels": labels}

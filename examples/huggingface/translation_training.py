"""Samples to train encoder-decoder models on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq.hf.knn.batches import Batch, SentencePair


class Pairs(torch.utils.data.Dataset):
    """Sources and targets as tokens."""

    def __init__(self, pairs: Sequence[SentencePair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.pairs[number].source_T, "labels": self.pairs[number].target_T}


class PairPadding:
    """Makes a batch of pairs; padding is nothing to learn, and the model makes its decoder's inputs of the labels."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The batch, by the names of the model's parameters."""
        batch = Batch.of_pairs([SentencePair(sample["input_ids"], sample["labels"]) for sample in samples])
        ids = batch.ids_BT.masked_fill(~batch.is_text_BT, self.pad_id)
        return {"input_ids": ids, "attention_mask": batch.is_text_BT.long(), "labels": batch.labels_BT}

"""Fine-tuning through Hugging Face's Trainer, on windows that follow one another."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)

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


def train(model: Any, tokenizer: Any, training: TrainingArguments, blocks: Blocks, validation: Blocks | None) -> None:
    """Train a model in place and save it into the output folder; goes on from the last checkpoint that is there."""
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=blocks,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=Padding(end or 0),
    )
    last = training.resume_from_checkpoint
    if last is None and os.path.isdir(training.output_dir):
        last = get_last_checkpoint(training.output_dir)
    if last:
        logger.info("training goes on from %s", last)
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics | {"train_samples": len(blocks)})
    trainer.save_state()

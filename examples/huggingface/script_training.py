"""Fine-tuning through Hugging Face's Trainer."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


def train(
    model: Any, tokenizer: Any, training: TrainingArguments, samples: Any, validation: Any, collator: Any
) -> None:
    """Train a model in place and save it into the output folder; goes on from the last checkpoint that is there.

    Args:
        samples: a data set of samples to train on.
        validation: one to compute the loss of while training; None for none.
        collator: makes a batch of samples.
    """
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=samples,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=collator,
    )
    last = training.resume_from_checkpoint
    if last is None and os.path.isdir(str(training.output_dir)):
        last = get_last_checkpoint(training.output_dir)
    if last:
        logger.info("training goes on from %s", last)
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics | {"train_samples": len(samples)})
    trainer.save_state()


def pad_id(tokenizer: Any) -> int:
    """The token that fills batches up."""
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return end or 0

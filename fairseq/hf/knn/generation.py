"""Texts that a model writes, for many inputs at once.

Shapes: B inputs of a batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.hf.hooks.seq2seq import is_seq2seq

logger = logging.getLogger(__name__)


def generate_texts(
    model: Any, tokenizer: Any, inputs: Sequence[Tensor], settings: Mapping[str, Any], batch_size: int
) -> list[str]:
    """What a model writes for each input: an encoder-decoder's output, or what a decoder continues its prompt with.

    Inputs of like length go together, which leaves little padding; that of prompts is on the left.

    Args:
        inputs: int64 tokens of each.
        settings: arguments of ``generate``.
    """
    has_encoder = is_seq2seq(model)
    order = sorted(range(len(inputs)), key=lambda n: -len(inputs[n]))
    texts = [""] * len(inputs)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        ids_BT, mask_BT = _side_by_side([inputs[n] for n in numbers], tokenizer.pad_token_id or 0, left=not has_encoder)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), **settings
            )
        written = found if has_encoder else found[:, ids_BT.shape[1] :]
        for n, text in zip(numbers, tokenizer.batch_decode(written, skip_special_tokens=True)):
            texts[n] = text
        logger.info("%d of %d texts are generated", first + len(numbers), len(order))
    return texts


def _side_by_side(inputs: Sequence[Tensor], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Inputs padded to one length, and their mask, both (B, T)."""
    longest = max(map(len, inputs))
    ids_BT, mask_BT = torch.full((len(inputs), longest), pad), torch.zeros(len(inputs), longest, dtype=torch.int64)
    for row, ids_T in enumerate(inputs):
        at = slice(longest - len(ids_T), None) if left else slice(0, len(ids_T))
        ids_BT[row, at], mask_BT[row, at] = ids_T, 1
    return ids_BT, mask_BT

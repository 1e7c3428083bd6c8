"""Digests that identify a model or a tokenizer, for the metadata of a store."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.hf.hooks.taps import output_embedding

_NUMBERS_PER_PARAMETER = 256


def model_digest(model: nn.Module) -> str:
    """Hexadecimal digest of all parameters' names and shapes and of some numbers of each, in bfloat16.

    Some numbers are enough to distinguish training runs, and a type of half the width usually rounds them to the same.
    """
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(f"{name} {tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        if flat.is_floating_point() and len(flat):
            some = flat[:: max(1, len(flat) // _NUMBERS_PER_PARAMETER)].cpu().to(torch.bfloat16)
            whole.update(some.view(torch.int16).numpy().tobytes())
    return whole.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hexadecimal digest of a tokenizer's vocabulary: every token and its number."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def vocabulary_size(model: nn.Module) -> int:
    """Number of tokens the model gives a score to."""
    head = output_embedding(model)
    weight = getattr(head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return int(model.config.get_text_config(decoder=True).vocab_size)  # type: ignore[union-attr,operator]


def model_type(model: nn.Module) -> str:
    """The architecture's name in transformers, which the names of stores begin with."""
    return str(model.config.model_type)  # type: ignore[union-attr]

"""Encoder-decoder models: which model is one, its decoder, and the decoder's inputs made from labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_seq2seq(model: nn.Module) -> bool:
    """True if the model has an encoder; its labels are then the tokens to predict, not its inputs."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_path(model: nn.Module) -> str | None:
    """Dotted path of an encoder-decoder model's decoder; None for other models, or where the model names none."""
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if get is not None and is_seq2seq(model) else None
    return next((path for path, module in model.named_modules() if path and module is decoder), None)


def shifted_labels(model: nn.Module, labels: Tensor) -> Tensor | None:
    """The decoder's input ids that an encoder-decoder model makes from labels; None if only its forward makes them."""
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return None if shift is None else shift(labels=labels)

"""Whether a model predicts the next token: one that reads ahead knows it, and its perplexity means nothing."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.seq2seq import is_seq2seq

logger = logging.getLogger(__name__)

_LENGTH = 8
_LEAST_CHANGE = 1e-5
"""Share of the largest score by which scores that read ahead differ; experts that share a batch round differently."""
_CANNOT_BE_CALLED = (TypeError, ValueError, AttributeError, LookupError, AssertionError, RuntimeError)
_CAUSAL: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def require_causal(model: nn.Module, name: str | None = None) -> None:
    """Raise ValueError for a decoder whose scores at a position depend on later tokens, found by two short calls.

    The decoder of an encoder-decoder model is not called: it does not read ahead.

    Args:
        name: the model's folder or name, for the message.
    """
    if model in _CAUSAL or is_seq2seq(model):
        return
    if _reads_ahead(model):
        kind = type(model).__name__
        raise ValueError(
            f"{kind if name is None else f'{name} ({kind})'} reads the tokens that it is to predict: changing later "
            "tokens changes earlier scores, so its perplexity means nothing; take a causal language model, or an "
            "encoder that was trained as one (is_decoder=true in its config.json)"
        )
    _CAUSAL.add(model)


def _reads_ahead(model: nn.Module) -> bool:
    """True if other tokens in the second half of a text change scores in the first half."""
    config: Any = model.config
    settings = config.get_text_config(decoder=True)
    length = min(_LENGTH, getattr(settings, "max_position_embeddings", None) or _LENGTH)
    first = length // 2
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        vocabulary, device = embeddings.weight.shape[0], embeddings.weight.device
        ids_BT = torch.arange(1, length + 1, device=device).repeat(2, 1) % vocabulary
        ids_BT[1, first:] = (ids_BT[1, first:] + vocabulary // 2) % vocabulary
        # One after the other: the rows of one batch may be rounded differently.
        with _evaluating(model):
            one, other = (_scores(model, ids_BT[row : row + 1])[0, :first].float() for row in range(2))
    except _CANNOT_BE_CALLED as error:
        logger.info("%s cannot be asked whether it reads ahead: %s", type(model).__name__, error)
        return False
    least = max(_LEAST_CHANGE, 4 * torch.finfo(embeddings.weight.dtype).eps)
    return bool((one - other).abs().max() > least * one.abs().max())


def _scores(model: nn.Module, ids_BT: Tensor) -> Tensor:
    named: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        named["use_cache"] = False
    logits: Tensor = model(**named, return_dict=True).logits
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the modules are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True

"""The model of a pipeline: its base, and the checkpoint that saving and evaluation use."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq.hf.hooks.causality import require_causal
from fairseq.hf.loading import check_tokenizer, naming_model
from fairseq.hf.pipeline.checkpoints import last_checkpoint
from fairseq.hf.pipeline.config import PipelineConfig
from fairseq.hf.pipeline.dataset import PairEncoder

logger = logging.getLogger(__name__)

_KIND = "language model"
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Base:
    """What ``model.name`` says, without its weights."""

    name: str
    config: Any
    tokenizer: Any
    encoder: PairEncoder

    @classmethod
    def of(cls, config: PipelineConfig) -> Base:
        """Load config and tokenizer. Raises: ValueError when there are none, or they do not fit the data section."""
        from transformers import AutoTokenizer

        name = config.model.name
        found = load_config(name)
        with naming_model(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(name, found, tokenizer, PairEncoder(tokenizer, found, config.data))


def load_config(name: str) -> Any:
    """The config of a model. Raises: ValueError when there is none."""
    from transformers import AutoConfig

    with naming_model(name, _KIND):
        return AutoConfig.from_pretrained(name)


def load_model(base: Base, name: str, precision: str) -> Any:
    """A model with its weights, in the type that a true precision trains in, or float32."""
    import transformers

    seq2seq, causal = transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM
    kind, settings = seq2seq if base.encoder.has_encoder else causal, {"output_loading_info": True}
    with naming_model(name, _KIND):
        loaded: Any = kind.from_pretrained(name, dtype=weight_type(precision), **settings)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        logger.warning("%s lacks %d weights, which are random now: %s ...", name, len(missing), missing[0])
    check_tokenizer(base.tokenizer, model)
    require_causal(model, name)
    return model


def weight_type(precision: str) -> torch.dtype:
    """Type of the weights; mixed precisions keep them in float32."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def tuned_model(config: PipelineConfig, base: Base) -> str:
    """Folder or name of the model that is saved from and evaluated.

    Raises: ValueError when nothing is trained yet, or it is of another kind than ``model.name``.
    """
    given = config.model.checkpoint
    folder = Path(given if given is not None else config.training.out_name)
    last = last_checkpoint(folder)
    if given is None and last is None:
        raise ValueError(
            f"training.out_name {str(folder)!r} holds no checkpoint; run train.py, or give model.checkpoint "
            "(model.checkpoint='${model.name}' for the model as it is)"
        )
    name = str(given if last is None else last)
    found = load_config(name).get_text_config(decoder=True)
    wanted = base.config.get_text_config(decoder=True)
    for field in _SIZES:
        one, other = getattr(found, field, None), getattr(wanted, field, None)
        if one != other:
            raise ValueError(
                f"model.checkpoint {name!r} is of another model: its {field} is {one}, that of model.name "
                f"{base.name!r} is {other}"
            )
    return name

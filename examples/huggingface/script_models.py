"""Models and tokenizers of a command: loaded, checked against each other, and put on their device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from script_arguments import ModelArguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainingArguments

from fairseq.hf.hooks.causality import require_causal
from fairseq.hf.loading import check_tokenizer, naming_model


@dataclass(frozen=True)
class ModelKind:
    """What a script loads models as."""

    auto_class: Any
    name: str


CAUSAL = ModelKind(AutoModelForCausalLM, "causal language model")
SEQ2SEQ = ModelKind(AutoModelForSeq2SeqLM, "encoder-decoder model")


def load_config(chosen: ModelArguments, kind: ModelKind) -> Any:
    """The model's config. Raises: ValueError when there is no such model."""
    with naming_model(chosen.config_name or chosen.model_name_or_path, kind.name):
        return AutoConfig.from_pretrained(chosen.config_name or chosen.model_name_or_path, **hub(chosen))


def load_tokenizer(chosen: ModelArguments, kind: ModelKind) -> Any:
    """The tokenizer. Raises: ValueError when there is none."""
    with naming_model(chosen.tokenizer_name or chosen.model_name_or_path, kind.name):
        return AutoTokenizer.from_pretrained(chosen.tokenizer_name or chosen.model_name_or_path, **hub(chosen))


def load_model(chosen: ModelArguments, config: Any, tokenizer: Any, kind: ModelKind) -> Any:
    """The model, fresh if only its config was named. Raises: ValueError when tokenizer and model do not fit."""
    if chosen.model_name_or_path is None:
        model = kind.auto_class.from_config(config, trust_remote_code=chosen.trust_remote_code)
    else:
        with naming_model(chosen.model_name_or_path, kind.name):
            model = kind.auto_class.from_pretrained(
                chosen.model_name_or_path, config=config, dtype=chosen.dtype, **hub(chosen)
            )
    check_tokenizer(tokenizer, model)
    require_causal(model, chosen.model_name_or_path)
    return model


def hub(chosen: ModelArguments) -> dict[str, Any]:
    """Arguments for loading from the hub."""
    names = ("cache_dir", "trust_remote_code")
    return {name: getattr(chosen, name) for name in names} | {"revision": chosen.model_revision}


@contextlib.contextmanager
def evaluating(model: Any, training: TrainingArguments) -> Iterator[None]:
    """Put the model on its device for reading only, in the precision that was asked for."""
    if training.fp16_full_eval or training.bf16_full_eval:
        model.to(torch.float16 if training.fp16_full_eval else torch.bfloat16)
    model.to(training.device).eval()
    half = torch.float16 if training.fp16 else torch.bfloat16
    with torch.autocast(training.device.type, dtype=half, enabled=training.fp16 or training.bf16):
        yield

"""Models and tokenizers of a command: loaded, checked against each other, and put on their device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from script_arguments import ModelArguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainingArguments


@dataclass(frozen=True)
class ModelKind:
    """What a script loads models as."""

    auto_class: Any
    name: str


CAUSAL = ModelKind(AutoModelForCausalLM, "causal language model")
SEQ2SEQ = ModelKind(AutoModelForSeq2SeqLM, "encoder-decoder model")


def load_config(chosen: ModelArguments, kind: ModelKind) -> Any:
    """The model's config. Raises: ValueError when there is no such model."""
    with naming_model(chosen.config_name or chosen.model_name_or_path, kind):
        return AutoConfig.from_pretrained(chosen.config_name or chosen.model_name_or_path, **hub(chosen))


def load_tokenizer(chosen: ModelArguments, kind: ModelKind) -> Any:
    """The tokenizer. Raises: ValueError when there is none."""
    with naming_model(chosen.tokenizer_name or chosen.model_name_or_path, kind):
        return AutoTokenizer.from_pretrained(chosen.tokenizer_name or chosen.model_name_or_path, **hub(chosen))


def load_model(chosen: ModelArguments, config: Any, tokenizer: Any, kind: ModelKind) -> Any:
    """The model, fresh if only its config was named. Raises: ValueError when tokenizer and model do not fit."""
    if chosen.model_name_or_path is None:
        model = kind.auto_class.from_config(config, trust_remote_code=chosen.trust_remote_code)
    else:
        with naming_model(chosen.model_name_or_path, kind):
            model = kind.auto_class.from_pretrained(
                chosen.model_name_or_path, config=config, dtype=chosen.dtype, **hub(chosen)
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together")
    return model


def hub(chosen: ModelArguments) -> dict[str, Any]:
    """Arguments for loading from the hub."""
    names = ("cache_dir", "trust_remote_code")
    return {name: getattr(chosen, name) for name in names} | {"revision": chosen.model_revision}


@contextlib.contextmanager
def naming_model(name: str | None, kind: ModelKind) -> Iterator[None]:
    """Say in one line that a model cannot be had."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder of a model, and it cannot be had from the hub: {reason}") from error
    except ValueError as error:  # an encoder, say; the lines that follow name all models there are
        raise ValueError(f"{name} is no {kind.name}: {str(error).strip().splitlines()[0]}") from error


@contextlib.contextmanager
def evaluating(model: Any, training: TrainingArguments) -> Iterator[None]:
    """Put the model on its device for reading only, in the precision that was asked for."""
    if training.fp16_full_eval or training.bf16_full_eval:
        model.to(torch.float16 if training.fp16_full_eval else torch.bfloat16)
    model.to(training.device).eval()
    half = torch.float16 if training.fp16 else torch.bfloat16
    with torch.autocast(training.device.type, dtype=half, enabled=training.fp16 or training.bf16):
        yield

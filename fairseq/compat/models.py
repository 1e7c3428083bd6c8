"""Models and named sizes in fairseq's form; the one model here is the transformer language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from fairseq.models.architectures import ARCHITECTURES, MODELS, build_model_config, register_model_architecture
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import Entry, registrar

__all__ = [
    "ARCH_MODEL_REGISTRY",
    "BaseFairseqModel",
    "FairseqLanguageModel",
    "LayerNorm",
    "base_lm_architecture",
    "gelu",
    "register_model",
    "register_model_architecture",
    "transformer_lm_baevski_gbw",
    "transformer_lm_baevski_wiki103",
    "transformer_lm_big",
    "transformer_lm_gpt",
]

BaseFairseqModel = FairseqLanguageModel = TransformerLanguageModel
LayerNorm = torch.nn.LayerNorm
gelu = torch.nn.functional.gelu
ARCH_MODEL_REGISTRY: Mapping[str, Any] = ARCHITECTURES

_enter = registrar(MODELS, "model")


def register_model(name: str, dataclass: type | None = None) -> Callable[[Any], Any]:
    """Make the decorator that enters a subclass of ``TransformerLanguageModel``, and an architecture of its name.

    Raises: ValueError for options of its own, or another class.
    """
    if dataclass is not None:
        raise ValueError(f"register_model: {name!r} has options of its own, which no model here can; {_WAY_OUT}")

    def add(kind: type[Any]) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, TransformerLanguageModel)):
            raise ValueError(f"register_model: {name!r} is no TransformerLanguageModel; {_WAY_OUT}")
        _enter(name)(Entry(TransformerLMConfig, kind))
        register_model_architecture(name, name)(lambda given: None)
        return kind

    return add


_WAY_OUT = "derive it from fairseq.models.transformer_lm.TransformerLanguageModel, whose settings it then has"


def _setter(arch: str) -> Callable[[Any], None]:
    """The function of ``args`` with which fairseq's architectures of this name begin."""

    def fill(settings: Any) -> None:
        own = {field.name for field in fields(TransformerLMConfig)}
        given = {name: value for name, value in vars(settings).items() if name in own}
        made = build_model_config(arch, given)
        for name in own - given.keys():
            setattr(settings, name, getattr(made, name))

    fill.__doc__ = f"Set what ``args`` lack to the values of ``--arch {arch}``."
    return fill


base_lm_architecture = _setter("transformer_lm")
transformer_lm_big = _setter("transformer_lm_big")
transformer_lm_baevski_wiki103 = _setter("transformer_lm_baevski_wiki103")
transformer_lm_baevski_gbw = _setter("transformer_lm_baevski_gbw")
transformer_lm_gpt = _setter("transformer_lm_gpt")

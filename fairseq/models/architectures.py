"""Named model sizes (``--arch``). Add your line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fairseq.config import Namespace, build
from fairseq.models.config import TransformerConfig, TransformerGnnConfig, TransformerLMConfig
from fairseq.registry import Entry, lookup, registrar


def _size(layers: int, width: int, inner: int, heads: int) -> dict[str, Any]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": inner,
        "decoder_attention_heads": heads,
    }


def _pair(layers: int, width: int, inner: int, heads: int) -> dict[str, Any]:
    """A size of encoder and decoder alike."""
    one = _size(layers, width, inner, heads)
    return one | {name.replace("decoder", "encoder"): value for name, value in one.items()}


# The setting of "Adaptive input representations" (arXiv 1809.10853) for WikiText-103.
_ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": (20000, 60000),
    "adaptive_softmax_cutoff": (20000, 60000),
    "adaptive_softmax_dropout": 0.2,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
    "no_decoder_final_norm": True,
}
_WIKI103_DROPOUT = {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1}
_GBW = _size(12, 512, 4096, 16) | {"attention_dropout": 0.1, "no_decoder_final_norm": True}
_WIKI103 = _size(16, 1024, 4096, 8) | _ADAPTIVE | _WIKI103_DROPOUT
_GPT = {"activation_fn": "gelu", "attention_dropout": 0.1}
_GPT3 = {
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "decoder_learned_pos": True,
    "share_decoder_input_output_embed": True,
}

Size = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]

ARCHITECTURES: dict[str, Size] = {
    "transformer_lm": {},
    "transformer_lm_gnn": {},
    "transformer_lm_gnn_wiki103": _WIKI103 | {"graph_dropout": 0.3, "graph_attention_dropout": 0.1},
    "transformer_lm_big": _size(12, 1024, 4096, 16),
    "transformer_lm_baevski_wiki103": _WIKI103,
    "transformer_lm_wiki103": _WIKI103,
    "transformer_lm_wiki103_small": _size(8, 512, 2048, 8) | _ADAPTIVE | _WIKI103_DROPOUT,
    "transformer_lm_wiki103_small_sm": _size(8, 128, 512, 4) | _WIKI103_DROPOUT,
    "transformer_lm_wiki103_150M": _size(16, 410, 2100, 10) | _WIKI103_DROPOUT,
    "transformer_lm_enwik8": _size(12, 512, 2048, 8) | _WIKI103_DROPOUT,
    "transformer_lm_baevski_gbw": _GBW,
    "transformer_lm_gbw": _GBW,
    "transformer_lm_gpt": _size(12, 768, 3072, 12) | _GPT,
    "transformer_lm_gpt2_tiny": _size(2, 64, 64, 1) | _GPT,
    "transformer_lm_gpt2_small": _size(24, 1024, 4096, 16) | _GPT,
    "transformer_lm_gpt2_medium": _size(36, 1280, 5120, 20) | _GPT,
    "transformer_lm_gpt2_big_wide": _size(24, 2048, 8192, 32) | _GPT,
    "transformer_lm_gpt2_big": _size(48, 1600, 6400, 25) | _GPT,
    "transformer_lm_gpt2_bigger": _size(48, 2048, 8192, 32) | _GPT,
    "transformer_lm_gpt3_small": _size(12, 768, 4 * 768, 12) | _GPT3,
    "transformer_lm_gpt3_medium": _size(24, 1024, 4 * 1024, 16) | _GPT3,
    "transformer_lm_gpt3_large": _size(24, 1536, 4 * 1536, 16) | _GPT3,
    "transformer_lm_gpt3_xl": _size(24, 2048, 4 * 2048, 32) | _GPT3,
    "transformer_lm_gpt3_2_7": _size(32, 2560, 4 * 2560, 32) | _GPT3,
    "transformer_lm_gpt3_6_7": _size(32, 4096, 4 * 4096, 32) | _GPT3,
    "transformer_lm_gpt3_13": _size(40, 5120, 4 * 5120, 40) | _GPT3,
    "transformer_lm_gpt3_175": _size(96, 12288, 4 * 12288, 96) | _GPT3,
}
# The sizes of "Attention is all you need" (arXiv 1706.03762) and of the papers after it.
_BIG = _pair(6, 1024, 4096, 16) | {"dropout": 0.3}
TRANSLATION: dict[str, Size] = {
    "transformer": {},
    "transformer_tiny": _pair(2, 64, 64, 2),
    "transformer_iwslt_de_en": _pair(6, 512, 1024, 4),
    "transformer_wmt_en_de": {},
    "transformer_vaswani_wmt_en_de_big": _BIG,
    "transformer_vaswani_wmt_en_fr_big": _BIG | {"dropout": 0.1},
    "transformer_wmt_en_de_big": _BIG | {"attention_dropout": 0.1},
    "transformer_wmt_en_de_big_t2t": _BIG
    | {
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    },
}
ARCHITECTURES.update(TRANSLATION)

_PLAIN = "transformer_lm"
GNN = "transformer_lm_gnn"
"""Name of the model of GNN-LM."""

# Model classes by name; plug-ins add subclasses of the one here.
MODELS: dict[str, Entry] = {
    _PLAIN: Entry(TransformerLMConfig, "fairseq.models.transformer_lm:TransformerLanguageModel"),
    GNN: Entry(TransformerGnnConfig, "fairseq.models.graph_lm:GraphLanguageModel"),
    "transformer": Entry(TransformerConfig, "fairseq.models.transformer:TransformerModel"),
}
# Architecture -> name of its model, where that is not a language model.
_MODEL_OF: dict[str, str] = dict.fromkeys(TRANSLATION, "transformer")
_MODEL_OF |= {arch: GNN for arch in ARCHITECTURES if arch.startswith(GNN)}

_enter = registrar(ARCHITECTURES, "architecture")


def register_model_architecture(name: str, arch: str | None = None) -> Callable[[Any], Any]:
    """Make the decorator with which a plug-in enters a named size: a dictionary of settings.

    With two names, of the model and of the architecture, it decorates a function of ``args`` that sets what the user
    did not give, as in fairseq.
    Raises: ValueError for an unknown model.
    """
    if arch is None:
        return _enter(name)
    lookup(MODELS, name, "model of register_model_architecture")

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        _enter(arch)(lambda given: _set_by(function, given))
        _MODEL_OF[arch] = name
        return function

    return add


def _set_by(function: Callable[[Any], None], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a function of ``args`` makes of what the user gave; those of no model here are dropped."""
    args = Namespace(**given)
    function(args)
    own = {field.name for kind in (TransformerConfig, TransformerGnnConfig) for field in fields(kind)}
    return {name: value for name, value in vars(args).items() if name in own}


def model_name(arch: str) -> str:
    """Name of the model that an architecture is a size of."""
    return _MODEL_OF.get(arch, _PLAIN)


def model_class(name: str) -> Any:
    """The class of a model's name. Raises: ValueError for a plug-in's model that is not registered."""
    if name not in MODELS:
        raise ValueError(f"the model {name!r} is a plug-in's; give the --user-dir that registers it")
    return MODELS[name].load()


def model_config_class(name: str) -> type[TransformerLMConfig]:
    """The config of a model's name. Raises: ValueError as :func:`model_class`."""
    if name not in MODELS:
        raise ValueError(f"the model {name!r} is a plug-in's; give the --user-dir that registers it")
    kind = MODELS[name].config
    return kind if issubclass(kind, TransformerLMConfig) else TransformerLMConfig


def build_model_config(arch: str, given: Mapping[str, Any]) -> TransformerLMConfig:
    """The config of a named size with what the user gave laid over it.

    Raises: ValueError for an unknown name, or values that contradict each other.
    """
    size = lookup(ARCHITECTURES, arch, "--arch")
    kind = model_config_class(model_name(arch))
    return build(kind, dict(size(given) if callable(size) else size) | dict(given))

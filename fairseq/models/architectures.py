"""Named model sizes (``--arch``). Add your line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairseq.config import build
from fairseq.models.config import TransformerLMConfig
from fairseq.registry import lookup, registrar


def _size(layers: int, width: int, inner: int, heads: int) -> dict[str, Any]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": inner,
        "decoder_attention_heads": heads,
    }


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

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "transformer_lm": {},
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

register_model_architecture = registrar(ARCHITECTURES, "architecture")


def build_model_config(arch: str, given: Mapping[str, Any]) -> TransformerLMConfig:
    """The config of a named size with what the user gave laid over it.

    Raises: ValueError for an unknown name, or values that contradict each other.
    """
    return build(TransformerLMConfig, lookup(ARCHITECTURES, arch, "--arch") | dict(given))

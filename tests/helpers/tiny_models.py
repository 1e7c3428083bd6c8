"""A tiny random model of each architecture, made from its config in a fraction of a second."""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 48
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_NEO = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 12,
    "max_position_embeddings": 64,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "gpt2": _GPT2,
    "gpt_neo": _NEO,
    "gpt_neox": _DECODER,
    "opt": _OPT,
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 8},
    "gemma": _DECODER | {"head_dim": 8},
    "gemma2": _DECODER | {"head_dim": 8},
    "gemma3_text": _DECODER | {"head_dim": 8},
    "phi": _DECODER,
    "phi3": _DECODER,
    "bart": _BART,
    "marian": _BART | {"decoder_vocab_size": VOCABULARY},
    "mbart": _BART,
    "m2m_100": _BART,
    "t5": _T5,
}
SEQ2SEQ = ("bart", "m2m_100", "marian", "mbart", "t5")
DECODERS = tuple(name for name in CONFIGS if name not in SEQ2SEQ)


def make(name: str, seed: int = 0, **more: object) -> torch.nn.Module:
    """The model, in evaluation mode. Its weights are large enough for predictions to differ."""
    settings = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "init_std": 0.3} | _TOKENS | CONFIGS[name] | more
    config = transformers.AutoConfig.for_model(name, **settings)
    kind = transformers.AutoModelForSeq2SeqLM if name in SEQ2SEQ else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    return kind.from_config(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: torch.nn.Module, batch: int = 3, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """A call with labels that all count."""
    ids = tokens(batch, length, seed=seed)
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens(batch, 6, seed=seed + 1), "labels": ids}
    return {"input_ids": ids, "labels": ids}


def shifted(model: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """The inputs of an encoder-decoder model's decoder that belong to labels, one sequence after the other."""
    pad = model.config.pad_token_id
    rows = []
    for row in labels.tolist():
        text = [token for token in row if token != -100]
        first = text[-1] if model.config.model_type == "mbart" else model.config.decoder_start_token_id
        rows.append(([first, *text] + [pad] * len(row))[: len(row)])
    return torch.tensor(rows)


_CACHES = ("cache", "past_key_values", "cache_params")
"""What releases of transformers call a key-value cache: 5.24, those before it, and their state-space models."""


def cache_in(output) -> object:
    """The cache of an output."""
    return next(output[name] for name in _CACHES if output.get(name) is not None)


def resuming(model: torch.nn.Module, cache: object) -> dict[str, object]:
    """Arguments of a call that resumes a cache."""
    parameters = inspect.signature(model.forward).parameters
    return {next(name for name in _CACHES if name in parameters): cache, "use_cache": True}

"""Tiny random models, and an oracle: dense attention over memories and local keys, from the paper's formulas."""

from __future__ import annotations

import contextlib
import inspect
import math

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

SMALL = dict(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.25,
)  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 12}
OLD = dict(vocab_size=61, n_embd=48, n_layer=3, n_head=4, n_positions=96, bos_token_id=1, eos_token_id=2)
MODELS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 8},
    "qwen2": GROUPED | {"use_sliding_window": False},
    "qwen3": GROUPED,
    "phi": SMALL | {"partial_rotary_factor": 0.5},
    "phi3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED
    | {"sliding_window": 8, "query_pre_attn_scalar": 12, "tie_word_embeddings": False, "attn_implementation": "eager"},
    "gemma3_text": GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 12},
    "cohere": GROUPED,
    "gpt_oss": GROUPED
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "attn_implementation": "eager"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt_neox": SMALL | {"rotary_pct": 0.5},
    "gptj": dict(
        vocab_size=61, n_embd=48, n_layer=3, n_head=4, n_positions=96, rotary_dim=4, bos_token_id=1, eos_token_id=2
    ),
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "gpt2": OLD,
    "mpt": dict(vocab_size=61, d_model=48, n_layers=3, n_heads=4, max_seq_len=96),
}
ROTARY = [name for name in MODELS if name not in ("opt", "gpt2", "mpt")]


def tiny(name: str, seed: int = 0, **changes):
    """A random model of an architecture; weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    settings = MODELS[name] | changes
    config_class = CONFIG_MAPPING[name]
    if name == "gptj" and not MODEL_FOR_CAUSAL_LM_MAPPING[config_class]._supports_sdpa:
        pytest.skip("GPT-J calls the attention interface from transformers 5.24 on")
    implementation = settings.pop("attn_implementation", "eager" if name == "mpt" else "sdpa")
    config = config_class(**settings)
    config.initializer_range = 0.25
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (1, count), generator=torch.Generator().manual_seed(seed))


def rotation(config, layer: int) -> tuple[float, float]:
    """Base of the angles, and which share of a head turns."""
    if config.model_type == "gptj":
        return 10000.0, config.rotary_dim / (config.n_embd / config.n_head)
    rope = config.rope_parameters
    rope = rope[config.layer_types[layer]] if "rope_theta" not in rope else rope
    return rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)


def unrotated(key_GSD: torch.Tensor, config, layer: int) -> torch.Tensor:
    """Keys of positions 0, 1, ... turned back to position 0, by the rotation's own formula."""
    base, share = rotation(config, layer)
    turning = round(key_GSD.shape[-1] * share)
    place_S1 = torch.arange(key_GSD.shape[1], dtype=torch.float64)[:, None]
    angle_SE = -place_S1 * base ** (-torch.arange(0, turning, 2, dtype=torch.float64) / turning)
    x, rest = key_GSD[..., :turning].double(), key_GSD[..., turning:]
    neighbours = config.model_type in ("cohere", "gptj")  # these turn neighbouring numbers, the others halves
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    cos, sin = angle_SE.cos(), angle_SE.sin()
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
    return torch.cat([joined.to(key_GSD), rest], -1)


@torch.no_grad()
def plain_memories(model, token_ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (G, S, D) of each layer from the model's own cache of one window, keys turned back."""
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    # Without a config: layers with a window keep everything.
    cache = model(input_ids=token_ids, use_cache=True, **{named: DynamicCache()})[named]
    found = {}
    for layer, kept in enumerate(cache.layers):
        key = unrotated(kept.keys[0], model.config, layer) if model.config.model_type in ROTARY else kept.keys[0]
        found[layer] = (key, kept.values[0])
    return found


@contextlib.contextmanager
def oracle(model, memories, *, topk, threshold=None, layers=None):
    """While the block runs, the model attends densely over all memories, all but each query's best masked."""

    def attention(
        module, query, key, value, attention_mask, scaling=None, softcap=None, is_causal=None, s_aux=None, **_
    ):
        heads_each = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads_each, 1), value.repeat_interleave(heads_each, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        length = key.shape[2]
        see = torch.ones(query.shape[2], length, dtype=torch.bool).tril(length - query.shape[2])[None, None]
        if attention_mask is not None:
            see = attention_mask if attention_mask.dtype is torch.bool else attention_mask == 0
        local = query @ key.mT * scale
        if layers is None or module.layer_idx in layers:
            memory_key, memory_value = (x.repeat_interleave(heads_each, 0)[None] for x in memories[module.layer_idx])
            cosine = torch.einsum("bhtd,xhsd->bhts", query, memory_key)
            cosine = cosine / query.norm(dim=-1)[..., None] / memory_key.norm(dim=-1)[:, :, None]
            rank = cosine.argsort(-1, descending=True).argsort(-1)
            use = (rank < topk) & (cosine > (-2 if threshold is None else threshold))
            score = torch.cat([torch.einsum("bhtd,xhsd->bhts", query, memory_key) * scale, local], -1)
            see = torch.cat([use, see.expand(*use.shape[:3], -1)], -1)
            value = torch.cat([memory_value.expand(len(query), -1, -1, -1), value], 2)
        else:
            score = local
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~see, -math.inf)
        if s_aux is not None:  # a place that every query sees and that holds nothing
            score = torch.cat([score, s_aux[None, :, None, None].expand(*score.shape[:3], 1)], -1)
            value = torch.nn.functional.pad(value, (0, 0, 0, 1))
        weight = score.softmax(-1).nan_to_num(0.0)
        return (weight @ value).transpose(1, 2), None

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "oracle"
    try:
        yield
    finally:
        model.config._attn_implementation = before

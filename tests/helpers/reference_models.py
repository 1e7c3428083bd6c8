"""Llama and MPT with memories written out in plain torch, without transformers, from the papers' formulas.

Sources: arXiv 2406.02332 (memories), arXiv 2108.12409 (ALiBi). One sequence, one window, heads without groups.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, layer_norm, silu


def numbers(shape, salt: int) -> torch.Tensor:
    """Weights that any program can make again: sines of large steps."""
    count = math.prod(shape)
    steps = torch.arange(count, dtype=torch.float64) * 12.9898 + salt * 78.233
    return (torch.sin(steps) * 43758.5453 % 1.0 - 0.5).float().reshape(shape)


def llama_weights(vocab=31, dim=16, inner=24, layers=2):
    names = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,), "lm_head.weight": (vocab, dim)}
    for n in range(layers):
        names |= {f"model.layers.{n}.self_attn.{x}_proj.weight": (dim, dim) for x in "qkvo"}
        names |= {f"model.layers.{n}.mlp.{x}_proj.weight": (inner, dim) for x in ("gate", "up")}
        names |= {f"model.layers.{n}.mlp.down_proj.weight": (dim, inner)}
        names |= {f"model.layers.{n}.{x}_layernorm.weight": (dim,) for x in ("input", "post_attention")}
    return {name: numbers(shape, salt) + ("norm" in name) for salt, (name, shape) in enumerate(names.items())}


def mpt_weights(vocab=31, dim=16, layers=2):
    names = {"transformer.wte.weight": (vocab, dim), "transformer.norm_f.weight": (dim,)}
    for n in range(layers):
        own = {"norm_1": (dim,), "attn.Wqkv": (3 * dim, dim), "attn.out_proj": (dim, dim), "norm_2": (dim,)}
        own |= {"ffn.up_proj": (4 * dim, dim), "ffn.down_proj": (dim, 4 * dim)}
        names |= {f"transformer.blocks.{n}.{x}.weight": shape for x, shape in own.items()}
    weights = {name: numbers(shape, salt) + ("norm" in name) for salt, (name, shape) in enumerate(names.items())}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def attend(query, key, value, memory, rule, memory_bias, local_bias):
    """(T, H, D) each; memory is (key, value) or None. Returns the output, and the chosen memories (H, T, K)."""
    time, heads, width = query.shape
    out, chosen = torch.zeros_like(query), torch.zeros(heads, time, 0, dtype=torch.int64)
    if memory is not None:
        topk = min(rule["topk"], len(memory[0]))
        chosen = torch.zeros(heads, time, topk, dtype=torch.int64)
    for h in range(heads):
        for t in range(time):
            scores = [float(query[t, h] @ key[j, h]) / math.sqrt(width) + local_bias(h, t, j) for j in range(t + 1)]
            values = [value[j, h] for j in range(t + 1)]
            if memory is not None:
                cosine = torch.cosine_similarity(query[t, h][None], memory[0][:, h], dim=-1)
                chosen[h, t] = cosine.topk(topk).indices
                for s in chosen[h, t].tolist():
                    if not rule["mask_by_sim"] or cosine[s] > rule["sim_threshold"]:
                        score = float(query[t, h] @ memory[0][s, h]) / math.sqrt(width)
                        scores.append(score + memory_bias(h, t))
                        values.append(memory[1][s, h])
            out[t, h] = torch.tensor(scores).softmax(0) @ torch.stack(values)
    return out, chosen


def norm_of(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def turned(x):
    """Rotary embedding of (T, H, D) at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def llama(weights, token_ids, heads, memories=None, rule=None):
    """Logits, the chosen memories, and (keys without rotation, values) of each layer."""
    x, kept, found, layer = weights["model.embed_tokens.weight"][token_ids], [], [], 0
    while (prefix := f"model.layers.{layer}.") + "mlp.up_proj.weight" in weights:
        of = {name.removeprefix(prefix).removesuffix(".weight"): w for name, w in weights.items()}
        h = norm_of(x, of["input_layernorm"])
        q, k, v = ((h @ of[f"self_attn.{name}_proj"].T).view(len(x), heads, -1) for name in "qkv")
        kept.append((k, v))
        memory = memories[layer] if memories else None
        out, chosen = attend(turned(q), turned(k), v, memory, rule, lambda *_: 0.0, lambda *_: 0.0)
        found.append(chosen)
        x = x + out.flatten(1) @ of["self_attn.o_proj"].T
        h = norm_of(x, of["post_attention_layernorm"])
        x = x + (silu(h @ of["mlp.gate_proj"].T) * (h @ of["mlp.up_proj"].T)) @ of["mlp.down_proj"].T
        layer += 1
    return norm_of(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T, found, kept


def mpt(weights, token_ids, heads, memories=None, rule=None):
    """As :func:`llama`; a memory stands one place before the first local token, where a place costs a slope."""
    x, kept, found, layer = weights["transformer.wte.weight"][token_ids], [], [], 0
    slopes = [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
    while (prefix := f"transformer.blocks.{layer}.") + "ffn.up_proj.weight" in weights:
        of = {name.removeprefix(prefix).removesuffix(".weight"): w for name, w in weights.items()}
        h = layer_norm(x, x.shape[-1:], of["norm_1"])
        q, k, v = (part.view(len(x), heads, -1) for part in (h @ of["attn.Wqkv"].T).chunk(3, -1))
        kept.append((k, v))
        memory = memories[layer] if memories else None
        out, chosen = attend(
            q, k, v, memory, rule, lambda h, t: -slopes[h] * (t + 1), lambda h, t, j: -slopes[h] * (t - j)
        )
        found.append(chosen)
        x = x + out.flatten(1) @ of["attn.out_proj"].T
        h = layer_norm(x, x.shape[-1:], of["norm_2"])
        x = x + gelu(h @ of["ffn.up_proj"].T) @ of["ffn.down_proj"].T
        layer += 1
    return layer_norm(x, x.shape[-1:], weights["transformer.norm_f.weight"]) @ weights["lm_head.weight"].T, found, kept

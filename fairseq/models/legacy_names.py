"""Parameter names of fairseq's versions -> those of this package. Border code: names only, no model is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Entries that say nothing about a model's function; versions differ in which of them they write.
_MARKERS = re.compile(r"(^|\.)(version|_float_tensor)$")
_OLD_NORMS = {"0": "self_attn_layer_norm", "1": "final_layer_norm"}


def upgrade_state_dict(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Respell a state dict of fairseq 0.6 to 0.12 with the names a model has.

    Args:
        own: the model's state dict: says which names are wanted, and supplies markers the file lacks.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("embed_positions.weights"):  # sinusoids, which newer versions compute
            continue
        name = re.sub(r"(^|\.)embed_out$", r"\1output_projection.weight", name)
        name = re.sub(r"layer_norms\.([01])\.", lambda hit: _OLD_NORMS[hit.group(1)] + ".", name)
        parts = re.fullmatch(r"(.*\.)in_proj_(weight|bias)", name)
        if parts:  # queries, keys and values in one matrix
            prefix, kind = parts.groups()
            for letter, rows in zip("qkv", value.chunk(3)):
                found[f"{prefix}{letter}_proj.{kind}"] = rows
        else:
            found[name] = value
    shared = "decoder.output_projection.weight"
    if shared in own and shared not in found and "decoder.embed_tokens.weight" in found:
        same = own[shared].data_ptr() == own["decoder.embed_tokens.weight"].data_ptr()
        if same:  # fairseq 0.9 writes a shared matrix once
            found[shared] = found["decoder.embed_tokens.weight"]
    for name, value in own.items():
        if _MARKERS.search(name):
            found.setdefault(name, torch.zeros_like(value) if name.endswith("_float_tensor") else value)
    return {name: value for name, value in found.items() if name in own or not _MARKERS.search(name)}

"""Weights of GNN-LM's published checkpoints (arXiv 2110.08743) under the names that they have here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:\w+\.)*?(gcs\.\d+\..+)")
_CODEC = re.compile(r"(?:\w+\.)*tgt_quantizer\..+")


def holds_graph(weights: Mapping[str, Tensor]) -> bool:
    """True if there are layers over a graph of neighbours."""
    return any(_LAYER.fullmatch(name) for name in weights)


def renamed(weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Weights with the graph's layers under ``gnn``; the codec's tables are left out: features have their own file."""
    found, dropped = {}, 0
    for name, value in weights.items():
        layer = _LAYER.fullmatch(name)
        if _CODEC.fullmatch(name):
            dropped += 1
            continue
        found[f"gnn.{layer.group(1)}" if layer else name] = value
    if dropped:
        logger.warning(
            "%s holds a product quantizer beside its weights, which is not read; --graph-features names codes, and "
            "without it the train split's own keys are read",
            path,
        )
    return found


def graph_settings(weights: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the graph's layers, from the shapes of their weights (as renamed).

    Args:
        values: the settings of the file.
    """
    numbers = [int(name.split(".")[2]) for name in weights if name.startswith("gnn.gcs.")]
    width = weights["gnn.gcs.0.k_linears.0.weight"].shape[0]
    given = {
        "graph_layer": max(numbers) + 1,
        "graph_attention_heads": weights["gnn.gcs.0.relation_pri"].shape[1],
        "decoder_gcn_dim": width,
        "graph_start": "reference",
        "orig_prob_ratio": float(values.get("orig_prob_ratio") or 0.0),
        "kind": "transformer_lm_gnn",
    }
    return given | ({"intra_context": int(values["intra_context"])} if values.get("intra_context") else {})

"""Layers and positions of either side of a transformer, by the settings of that side."""

from __future__ import annotations

from typing import Any

from fairseq.modules.positional_embedding import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from fairseq.modules.transformer_layer import TransformerLayer


def make_positions(
    config: Any, width: int, longest: int, pad: int, *, learned: bool
) -> LearnedPositionalEmbedding | SinusoidalPositionalEmbedding | None:
    """Position embedding of a side; None for a model without."""
    if config.no_token_positional_embeddings:
        return None
    kind = LearnedPositionalEmbedding if learned else SinusoidalPositionalEmbedding
    return kind(longest, width, pad)


def make_layer(config: Any, side: str, encoder_width: int | None = None) -> TransformerLayer:
    """A layer of a side, ``encoder`` or ``decoder``; one that attends to an encoder has that one's width too."""
    return TransformerLayer(
        getattr(config, f"{side}_embed_dim"),
        getattr(config, f"{side}_ffn_embed_dim"),
        getattr(config, f"{side}_attention_heads"),
        activation=config.activation_fn,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        normalize_before=getattr(config, f"{side}_normalize_before"),
        encoder_width=encoder_width,
    )

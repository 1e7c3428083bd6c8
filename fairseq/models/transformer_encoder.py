"""The encoder of transformers: source sentences to hidden states.

Shapes: B sentences, S positions, C width. Parameter names are fairseq's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq.models.config import TransformerConfig
from fairseq.models.parts import make_layer, make_positions
from fairseq.modules.multihead_attention import Encoded
from fairseq.modules.positional_embedding import LearnedPositionalEmbedding
from fairseq.modules.transformer_layer import TransformerLayer


class TransformerEncoder(nn.Module):
    """Embedding and layers in which every position sees the whole sentence."""

    def __init__(self, config: TransformerConfig, dictionary_size: int, pad: int) -> None:
        super().__init__()
        self.config = config
        self.pad = pad
        width = config.encoder_embed_dim
        self.register_buffer("version", torch.full((1,), 3.0))
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(width)
        self.embed_tokens = nn.Embedding(dictionary_size, width, padding_idx=pad)
        self.embed_positions = make_positions(
            config, width, config.max_source_positions, pad, learned=config.encoder_learned_pos
        )
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        count = len(config.encoder_layers_to_keep or ()) or config.encoder_layers
        self.layers = nn.ModuleList(make_layer(config, "encoder") for _ in range(count))
        self.layer_norm = nn.LayerNorm(width) if config.encoder_normalize_before else None

    def reset_parameters(self) -> None:
        """Draw the initial weights as the decoder does."""
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, TransformerLayer, LearnedPositionalEmbedding)):
                module.reset_parameters()
        nn.init.normal_(self.embed_tokens.weight, std=self.embed_tokens.embedding_dim**-0.5)
        nn.init.zeros_(self.embed_tokens.weight[self.pad])

    def forward(self, source_BS: Tensor) -> Encoded:
        """Hidden states of sentences that may be padded on either side."""
        x_BSC = self.embed_scale * self.embed_tokens(source_BS)
        if self.embed_positions is not None:
            x_BSC = x_BSC + self.embed_positions(source_BS)
        if self.layernorm_embedding is not None:
            x_BSC = self.layernorm_embedding(x_BSC)
        x_BSC = F.dropout(x_BSC, self.config.dropout, self.training)
        visible_BS = source_BS != self.pad
        keeps_all = not source_BS.is_cuda and bool(visible_BS.all())  # a GPU would have to be waited for
        visible = None if keeps_all else visible_BS
        mask_B1S = None if visible is None else visible[:, None]
        saves_memory = self.config.checkpoint_activations and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if self.training and 0 < self.config.encoder_layerdrop > torch.rand(()).item():
                continue
            if saves_memory:
                x_BSC, _ = checkpoint(layer, x_BSC, is_causal=False, mask_BTS=mask_B1S, use_reentrant=False)
            else:
                x_BSC, _ = layer(x_BSC, is_causal=False, mask_BTS=mask_B1S)
        if self.layer_norm is not None:
            x_BSC = self.layer_norm(x_BSC)
        return Encoded(x_BSC, visible)

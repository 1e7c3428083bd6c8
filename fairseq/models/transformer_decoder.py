"""The decoder of transformers: embedding, causal layers and output layer.

Shapes: B blocks, T positions, S positions of the source, D width. Parameter names are fairseq's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq.models.config import TransformerLMConfig, layer_of_tap
from fairseq.models.outputs import LMOutput
from fairseq.models.parts import make_layer, make_positions
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax, SharedLinear
from fairseq.modules.multihead_attention import Encoded, IncrementalState
from fairseq.modules.positional_embedding import LearnedPositionalEmbedding
from fairseq.modules.transformer_layer import TransformerLayer


class TransformerDecoder(nn.Module):
    """Embedding, causal layers and output layer."""

    def __init__(
        self,
        config: TransformerLMConfig,
        dictionary_size: int,
        pad: int,
        *,
        encoder_width: int | None = None,
        shared_embedding: nn.Embedding | None = None,
    ) -> None:
        """Args.

        encoder_width: of the encoder's output, where the layers attend to one.
        shared_embedding: the encoder's, when both sides share it.
        """
        super().__init__()
        self.config = config
        self.pad = pad
        width = config.decoder_embed_dim
        input_width = config.decoder_input_dim or width
        self.register_buffer("version", torch.full((1,), 3.0))
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(width)
        self.embed_tokens = shared_embedding or self._make_embedding(dictionary_size)
        self.embed_positions = make_positions(
            config, width, config.max_target_positions, pad, learned=config.decoder_learned_pos
        )
        adaptive = isinstance(self.embed_tokens, AdaptiveInput)
        narrow = not adaptive and input_width != width
        self.project_in_dim = nn.Linear(input_width, width, bias=False) if narrow else None
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(make_layer(config, "decoder", encoder_width) for _ in range(num_layers(config)))
        has_final_norm = config.decoder_normalize_before and not config.no_decoder_final_norm
        self.layer_norm = nn.LayerNorm(width) if has_final_norm else None
        self.output_width = config.decoder_output_dim or width
        other_width = self.output_width != width
        self.project_out_dim = nn.Linear(width, self.output_width, bias=False) if other_width else None
        has_head = config.knn_keytype == "separated_head"
        self.separated_head = nn.Linear(width, width, bias=False) if has_head else None
        self.adaptive_softmax: AdaptiveSoftmax | None = None
        self.output_projection: nn.Module | None = None
        if config.adaptive_softmax_cutoff is not None:
            shared_input = None
            if config.tie_adaptive_weights:
                assert isinstance(self.embed_tokens, AdaptiveInput), "the config requires an adaptive input"
                shared_input = self.embed_tokens
            self.adaptive_softmax = AdaptiveSoftmax(
                dictionary_size,
                self.output_width,
                config.adaptive_softmax_cutoff,
                factor=config.adaptive_softmax_factor,
                dropout=config.adaptive_softmax_dropout,
                adaptive_input=shared_input,
                tie_proj=config.tie_adaptive_proj,
            )
        elif config.share_decoder_input_output_embed:
            assert isinstance(self.embed_tokens, nn.Embedding), "the config excludes an adaptive input"
            self.output_projection = SharedLinear(self.embed_tokens.weight)
        else:
            self.output_projection = nn.Linear(self.output_width, dictionary_size, bias=False)

    def _make_embedding(self, dictionary_size: int) -> AdaptiveInput | nn.Embedding:
        config = self.config
        input_width = config.decoder_input_dim or config.decoder_embed_dim
        if config.adaptive_input:
            return AdaptiveInput(
                dictionary_size,
                self.pad,
                input_width,
                config.adaptive_input_factor,
                config.decoder_embed_dim,
                config.adaptive_input_cutoff or (),
            )
        return nn.Embedding(dictionary_size, input_width, padding_idx=self.pad)

    def reset_parameters(self) -> None:
        """Draw the initial weights as fairseq does: narrow normals for embeddings, Glorot's uniform for maps."""
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, TransformerLayer, LearnedPositionalEmbedding)):
                module.reset_parameters()
        if isinstance(self.embed_tokens, AdaptiveInput):
            self.embed_tokens.reset_parameters()
        else:
            nn.init.normal_(self.embed_tokens.weight, std=self.embed_tokens.embedding_dim**-0.5)
            nn.init.zeros_(self.embed_tokens.weight[self.pad])
        for projection in (self.project_in_dim, self.project_out_dim, self.separated_head):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
        if self.adaptive_softmax is not None:
            self.adaptive_softmax.reset_parameters()
        elif isinstance(self.output_projection, nn.Linear):
            nn.init.normal_(self.output_projection.weight, std=self.output_width**-0.5)

    def embed(self, tokens_BT: Tensor, state: IncrementalState | None) -> Tensor:
        """Input of the first layer, (B, T, D)."""
        x_BTD = self.embed_scale * self.embed_tokens(tokens_BT)
        if self.project_in_dim is not None:
            x_BTD = self.project_in_dim(x_BTD)
        if self.embed_positions is not None:
            before_B, num_before = (state.num_words_B, state.num_tokens) if state is not None else (None, 0)
            x_BTD = x_BTD + self.embed_positions(tokens_BT, before_B, num_before)
        if self.layernorm_embedding is not None:
            x_BTD = self.layernorm_embedding(x_BTD)
        return F.dropout(x_BTD, self.config.dropout, self.training)

    def forward(
        self,
        tokens_BT: Tensor,
        key_tap: str | None = None,
        incremental_state: IncrementalState | None = None,
        source: Encoded | None = None,
    ) -> LMOutput:
        """See ``TransformerLanguageModel.forward``; ``source`` is what the encoder made of the source sentences."""
        x_BTD = self.embed(tokens_BT, incremental_state)
        last_ffn_input_BTD = layer_output_BTD = None
        last, tapped = len(self.layers) - 1, layer_of_tap(key_tap or "")
        for number, layer in enumerate(self.layers):
            is_read = number + 1 == tapped or (number == last and key_tap in ("last_ffn_input", "separated_head"))
            if self._drops_layer() and not is_read:
                continue
            if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
                x_BTD, last_ffn_input_BTD = checkpoint(layer, x_BTD, None, str(number), source, use_reentrant=False)
            else:
                x_BTD, last_ffn_input_BTD = layer(x_BTD, incremental_state, str(number), source)
            if number + 1 == tapped:
                layer_output_BTD = x_BTD
        if incremental_state is not None:
            incremental_state.advance(tokens_BT != self.pad)
        if self.layer_norm is not None:
            x_BTD = self.layer_norm(x_BTD)
        if self.project_out_dim is not None:
            x_BTD = self.project_out_dim(x_BTD)
        keys = {None: None, "last_ffn_input": last_ffn_input_BTD, "model_output": x_BTD, "lm_output": x_BTD}
        if key_tap == "separated_head":
            assert self.separated_head is not None, "key_dim() was not asked first"
            return LMOutput(x_BTD, self.separated_head(last_ffn_input_BTD))
        return LMOutput(x_BTD, keys[key_tap] if tapped is None else layer_output_BTD)

    def _drops_layer(self) -> bool:
        rate = self.config.decoder_layerdrop
        return self.training and rate > 0 and torch.rand(()).item() < rate


def num_layers(config: TransformerLMConfig) -> int:
    """Layers the model has: those that are kept, if some are dropped."""
    return len(config.decoder_layers_to_keep or ()) or config.decoder_layers

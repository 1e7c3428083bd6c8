"""One layer of a transformer: attention to the text, in a decoder with an encoder to the source, then a feed-forward
block. Shapes: B batch, T time, D width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.modules.inference_linear import linear
from fairseq.modules.multihead_attention import Encoded, IncrementalState, MultiheadAttention

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "tanh": lambda x: x.tanh(),
    "linear": lambda x: x,
}


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward block, each with its residual connection and layer norm.

    Pre-norm: ``x + block(norm(x))``; post-norm: ``norm(x + block(x))``. Between the two, the layer of a decoder with
    an encoder attends to the encoder's output.
    """

    def __init__(
        self,
        width: int,
        inner_width: int,
        num_heads: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        normalize_before: bool = True,
        encoder_width: int | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.activation = ACTIVATION_FUNCTIONS[activation]
        self.normalize_before = normalize_before
        self.self_attn = MultiheadAttention(width, num_heads, attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn: MultiheadAttention | None = None
        if encoder_width is not None:
            self.encoder_attn = MultiheadAttention(width, num_heads, attention_dropout, encoder_width)
            self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for attention in (self.self_attn, self.encoder_attn):
            if attention is not None:
                attention.reset_parameters()
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x_BTD: Tensor,
        incremental_state: IncrementalState | None = None,
        name: str = "",
        source: Encoded | None = None,
        is_causal: bool = True,
        mask_BTS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer; returns its output and the input of its feed-forward block, both (B, T, D)."""
        x_BTD = self.attend_to_self(
            x_BTD, is_causal=is_causal, mask_BTS=mask_BTS, incremental_state=incremental_state, name=name
        )
        if self.encoder_attn is not None:
            assert source is not None, "a decoder with an encoder was given no source"
            x_BTD = self._attend_to_source(x_BTD, source, incremental_state, name)
        return self.feed_forward(x_BTD)

    def _attend_to_source(
        self, x_BTD: Tensor, source: Encoded, incremental_state: IncrementalState | None, name: str
    ) -> Tensor:
        assert self.encoder_attn is not None
        norm = self.encoder_attn_layer_norm
        query_BTD = norm(x_BTD) if self.normalize_before else x_BTD
        return self.add(x_BTD, self.encoder_attn.to_source(query_BTD, source, incremental_state, name), norm)

    def attend_to_self(
        self,
        x_BTD: Tensor,
        *,
        is_causal: bool,
        mask_BTS: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        name: str = "",
    ) -> Tensor:
        """The first half of the layer."""
        norm = self.self_attn_layer_norm
        attended_BTD = self.self_attn(
            norm(x_BTD) if self.normalize_before else x_BTD,
            mask_BTS=mask_BTS,
            is_causal=is_causal,
            incremental_state=incremental_state,
            name=name,
        )
        return self.add(x_BTD, attended_BTD, norm)

    def feed_forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The last half of the layer; returns its output and what its first linear map reads."""
        input_BTD = self.final_layer_norm(x_BTD) if self.normalize_before else x_BTD
        inner_BTF = self.activation(linear(self.fc1, input_BTD))
        inner_BTF = F.dropout(inner_BTF, self.activation_dropout, self.training)
        return self.add(x_BTD, linear(self.fc2, inner_BTF), self.final_layer_norm), input_BTD

    def add(self, x_BTD: Tensor, change_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The residual connection around a block, with the block's norm after it in a post-norm layer."""
        x_BTD = x_BTD + F.dropout(change_BTD, self.dropout, self.training)
        return x_BTD if self.normalize_before else norm(x_BTD)

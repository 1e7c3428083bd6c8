"""The transformer language model: tokens in, hidden states, memory keys and log-probabilities out.

Shapes: B blocks, T positions, N = any choice of positions, D width, V types. Parameter names are fairseq's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fairseq.fairseq_names import lazy
from fairseq.models.config import KEY_TAPS, TransformerLMConfig
from fairseq.models.legacy_names import upgrade_state_dict
from fairseq.models.outputs import LMOutput
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax, SharedLinear, log_softmax, pick
from fairseq.modules.multihead_attention import IncrementalState
from fairseq.modules.positional_embedding import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from fairseq.modules.transformer_layer import TransformerLayer


class TransformerDecoder(nn.Module):
    """Embedding, causal layers and output layer."""

    def __init__(self, config: TransformerLMConfig, dictionary_size: int, pad: int) -> None:
        super().__init__()
        self.config = config
        self.pad = pad
        width = config.decoder_embed_dim
        input_width = config.decoder_input_dim or width
        self.register_buffer("version", torch.full((1,), 3.0))
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(width)
        self.embed_tokens = self._make_embedding(dictionary_size)
        self.embed_positions = self._make_positions()
        adaptive = isinstance(self.embed_tokens, AdaptiveInput)
        narrow = not adaptive and input_width != width
        self.project_in_dim = nn.Linear(input_width, width, bias=False) if narrow else None
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        self.layers = nn.ModuleList(self._make_layer() for _ in range(num_layers(config)))
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

    def _make_positions(self) -> LearnedPositionalEmbedding | SinusoidalPositionalEmbedding | None:
        config = self.config
        if config.no_token_positional_embeddings:
            return None
        kind = LearnedPositionalEmbedding if config.decoder_learned_pos else SinusoidalPositionalEmbedding
        return kind(config.max_target_positions, config.decoder_embed_dim, self.pad)

    def _make_layer(self) -> TransformerLayer:
        config = self.config
        return TransformerLayer(
            config.decoder_embed_dim,
            config.decoder_ffn_embed_dim,
            config.decoder_attention_heads,
            activation=config.activation_fn,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
            normalize_before=config.decoder_normalize_before,
        )

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
        self, tokens_BT: Tensor, key_tap: str | None = None, incremental_state: IncrementalState | None = None
    ) -> LMOutput:
        """See :meth:`TransformerLanguageModel.forward`."""
        x_BTD = self.embed(tokens_BT, incremental_state)
        last_ffn_input_BTD = None
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if self._drops_layer() and not (number == last and key_tap in ("last_ffn_input", "separated_head")):
                continue
            if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
                x_BTD, last_ffn_input_BTD = checkpoint(layer, x_BTD, None, str(number), use_reentrant=False)
            else:
                x_BTD, last_ffn_input_BTD = layer(x_BTD, incremental_state, str(number))
        if incremental_state is not None:
            incremental_state.advance(tokens_BT != self.pad)
        if self.layer_norm is not None:
            x_BTD = self.layer_norm(x_BTD)
        if self.project_out_dim is not None:
            x_BTD = self.project_out_dim(x_BTD)
        keys = {None: None, "last_ffn_input": last_ffn_input_BTD, "model_output": x_BTD}
        if key_tap == "separated_head":
            assert self.separated_head is not None, "key_dim() was not asked first"
            return LMOutput(x_BTD, self.separated_head(last_ffn_input_BTD))
        return LMOutput(x_BTD, keys[key_tap])

    def _drops_layer(self) -> bool:
        rate = self.config.decoder_layerdrop
        return self.training and rate > 0 and torch.rand(()).item() < rate


class TransformerLanguageModel(nn.Module):
    """A causal language model with a plain or an adaptive softmax."""

    def __init__(self, config: TransformerLMConfig, dictionary_size: int, pad: int) -> None:
        super().__init__()
        self.config = config
        self.dictionary_size = dictionary_size
        self.pad = pad
        self.decoder = TransformerDecoder(config, dictionary_size, pad)

    @classmethod
    def build(cls, config: TransformerLMConfig, dictionary_size: int, pad: int) -> TransformerLanguageModel:
        """A freshly initialised model.

        Raises: ValueError when the config does not fit the dictionary.
        """
        model = cls.unfilled(config, dictionary_size, pad)  # or every weight would be drawn twice
        model.decoder.reset_parameters()
        return model

    @classmethod
    def unfilled(cls, config: TransformerLMConfig, dictionary_size: int, pad: int) -> TransformerLanguageModel:
        """A model whose weights are not set, to be loaded into: drawing weights takes longer than loading them.

        Raises: ValueError when the config does not fit the dictionary.
        """
        with _NoInit():
            return cls(config, dictionary_size, pad)

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str, checkpoint_file: str = "model.pt", data_name_or_path: str = ".", **more: Any
    ) -> Any:
        """A trained model that samples and scores text, as fairseq's hub gives.

        Args:
            model_name_or_path: folder of the checkpoint.
            checkpoint_file: its file; several separated by colons are an ensemble.
            data_name_or_path: folder of ``dict.txt``, within the first one or by itself.
            more: ``tokenizer``, ``bpe`` and their files; see ``fairseq.compat.hub.from_pretrained``.
        Raises: ValueError or OSError when a file is missing, or does not fit.
        """
        load = importlib.import_module("fairseq.compat.hub").from_pretrained
        return load(model_name_or_path, checkpoint_file, data_name_or_path, **more)

    @property
    def max_positions(self) -> int:
        """Longest input the model is made for."""
        return self.config.max_target_positions

    @property
    def longest_input(self) -> int | None:
        """Length that no input may exceed: where learned positions end; None when the model reads on for ever."""
        learned = isinstance(self.decoder.embed_positions, LearnedPositionalEmbedding)
        return self.config.max_target_positions if learned else None

    @property
    def has_adaptive_softmax(self) -> bool:
        """True if the output layer is an adaptive softmax."""
        return self.decoder.adaptive_softmax is not None

    def key_dim(self, key_tap: str) -> int:
        """Width of the memory keys read at a tap. Raises: ValueError for a tap the model does not have."""
        _require_tap(key_tap)
        if key_tap == "separated_head" and self.decoder.separated_head is None:
            raise ValueError(
                "--knn-keytype separated_head: the model was trained without that head; train one with it, or read "
                "last_ffn_input"
            )
        return self.decoder.output_width if key_tap == "model_output" else self.decoder.config.decoder_embed_dim

    @property
    def may_skip_parameters(self) -> bool:
        """True if some batches give some parameters no gradient."""
        return self.config.decoder_layerdrop > 0 or self.decoder.separated_head is not None

    def forward(
        self, tokens_BT: Tensor, key_tap: str | None = None, incremental_state: IncrementalState | None = None
    ) -> LMOutput:
        """Inner states of every position; position t has read tokens up to t.

        Args:
            tokens_BT: padded on the right.
            key_tap: also return this inner state: ``last_ffn_input`` (what the last layer's feed-forward block
                reads, after its layer norm in pre-norm models), ``model_output`` (what the output layer reads) or
                ``separated_head`` (a linear map of the first, for models made with it).
            incremental_state: holds what was read in earlier calls; ``tokens_BT`` are then the ones after that.
        Raises: ValueError for an unknown tap, or a text too long for learned positions.
        """
        if key_tap is not None:
            _require_tap(key_tap)
        out: LMOutput = self.decoder(tokens_BT, key_tap, incremental_state)
        return out

    def target_logp(self, hidden_ND: Tensor, target_N: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and the vocabulary's log-sum; both (N,) in float32.

        With an adaptive softmax the log-sum is that of the head alone.

        Args:
            chunk: rows whose vocabulary scores are held at once; all by default.
        """
        if chunk is None or chunk >= len(target_N):
            return self._target_logp(hidden_ND, target_N)
        parts = [self._target_logp(h, t) for h, t in zip(torch.split(hidden_ND, chunk), torch.split(target_N, chunk))]
        logps, norms = zip(*parts)
        return torch.cat(logps), torch.cat(norms)

    def _target_logp(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.decoder.adaptive_softmax is not None:
            return self.decoder.adaptive_softmax.target_logp(hidden_ND, target_N)
        return pick(self._output_scores(hidden_ND), target_N)

    def vocab_logp(self, hidden_ND: Tensor) -> Tensor:
        """Log-probability of every type, (N, V) in float32."""
        if self.decoder.adaptive_softmax is not None:
            return self.decoder.adaptive_softmax.vocab_logp(hidden_ND)
        return log_softmax(self._output_scores(hidden_ND))

    def _output_scores(self, hidden_ND: Tensor) -> Tensor:
        assert self.decoder.output_projection is not None, "there is an adaptive softmax instead"
        scores_NV: Tensor = self.decoder.output_projection(hidden_ND)
        return scores_NV

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, in any of fairseq's spellings."""
        return super().load_state_dict(upgrade_state_dict(state_dict, self.state_dict()), strict, assign)


class _NoInit(TorchFunctionMode):
    """Within it, modules are made without drawing their weights."""

    def __torch_function__(self, func: Any, types: Any, parts: Any = (), named: Any = None) -> Any:
        named = named or {}
        draws = getattr(func, "__module__", None) == "torch.nn.init"
        if draws or getattr(func, "__name__", "") in ("uniform_", "normal_", "fill_", "zero_"):
            return parts[0] if parts else named["tensor"]
        return func(*parts, **named)


def num_layers(config: TransformerLMConfig) -> int:
    """Layers the model has: those that are kept, if some are dropped."""
    return len(config.decoder_layers_to_keep or ()) or config.decoder_layers


def _require_tap(key_tap: str) -> None:
    if key_tap not in KEY_TAPS:
        raise ValueError(f"--knn-keytype {key_tap!r} is none of {', '.join(KEY_TAPS)}")


__getattr__, __dir__ = lazy(__name__)

"""The transformer language model: tokens in, hidden states, memory keys and log-probabilities out.

Shapes: B blocks, T positions, N = any choice of positions, D width, V types. Parameter names are fairseq's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fairseq.fairseq_names import lazy
from fairseq.models.config import TransformerLMConfig, layer_of_tap, require_tap
from fairseq.models.legacy_names import upgrade_state_dict
from fairseq.models.outputs import LMOutput
from fairseq.models.transformer_decoder import TransformerDecoder
from fairseq.modules import blocked_softmax, inference_linear
from fairseq.modules.adaptive_softmax import SharedLinear, log_softmax, pick
from fairseq.modules.positional_embedding import LearnedPositionalEmbedding

if TYPE_CHECKING:
    from fairseq.modules.multihead_attention import IncrementalState


class TransformerLanguageModel(nn.Module):
    """A causal language model with a plain or an adaptive softmax."""

    extends: type[TransformerLanguageModel] | None = None
    """Class of the model that is within this one and may be loaded alone."""

    def __init__(self, config: TransformerLMConfig, dictionary_size: int, pad: int) -> None:
        super().__init__()
        self.config = config
        self.dictionary_size = dictionary_size
        self.pad = pad
        self.decoder = TransformerDecoder(config, dictionary_size, pad)

    @classmethod
    def build(cls, config: Any, dictionary_size: int, pad: int, **more: int) -> TransformerLanguageModel:
        """A freshly initialised model; ``more`` as for :meth:`unfilled`.

        Raises: ValueError when the config does not fit the dictionary.
        """
        model = cls.unfilled(config, dictionary_size, pad, **more)  # or every weight would be drawn twice
        model.reset_parameters()
        return model

    @classmethod
    def unfilled(cls, config: Any, dictionary_size: int, pad: int, **more: int) -> TransformerLanguageModel:
        """A model whose weights are not set, to be loaded into: drawing weights takes longer than loading them.

        Args:
            more: ``source_size``, for a model that reads a source.
        Raises: ValueError when the config does not fit the dictionary.
        """
        with _NoInit():
            return cls(config, dictionary_size, pad, **more)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        self.decoder.reset_parameters()

    def is_own(self, name: str) -> bool:
        """True for a weight that the model which this one extends does not have."""
        del name
        return False

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
        require_tap(key_tap)
        if key_tap == "separated_head" and self.decoder.separated_head is None:
            raise ValueError(
                "--knn-keytype separated_head: the model was trained without that head; train one with it, or read "
                "last_ffn_input"
            )
        layer, there_are = layer_of_tap(key_tap), len(self.decoder.layers)
        if layer is not None and layer > there_are:
            raise ValueError(
                f"--knn-keytype {key_tap}: the model has {there_are} layers; give layer_1 to layer_{there_are}"
            )
        of_output = key_tap in ("model_output", "lm_output")
        return self.decoder.output_width if of_output else self.decoder.config.decoder_embed_dim

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
                reads, after its layer norm in pre-norm models), ``model_output`` (what the output layer reads),
                ``lm_output`` (the same before the graph's layers of a GNN-LM), ``separated_head`` (a linear map of the
                first, for models made with it) or ``layer_N`` (the output of layer N, the first one is 1).
            incremental_state: holds what was read in earlier calls; ``tokens_BT`` are then the ones after that.
        Raises: ValueError for an unknown tap, or a text too long for learned positions.
        """
        if key_tap is not None:
            require_tap(key_tap)
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
        weight_VD = self._output_weight()
        if weight_VD is not None and blocked_softmax.fits(hidden_ND, weight_VD):
            return blocked_softmax.target_logp(hidden_ND, weight_VD, target_N)
        return pick(self._output_scores(hidden_ND), target_N)

    def vocab_logp(self, hidden_ND: Tensor) -> Tensor:
        """Log-probability of every type, (N, V) in float32."""
        if self.decoder.adaptive_softmax is not None:
            return self.decoder.adaptive_softmax.vocab_logp(hidden_ND)
        return log_softmax(self._output_scores(hidden_ND))

    def vocab_scores(self, hidden_ND: Tensor) -> Tensor:
        """Scores of every type before any softmax, (N, V) float32; of an adaptive softmax with its head's log-sum."""
        if self.decoder.adaptive_softmax is not None:
            return self.decoder.adaptive_softmax.vocab_scores(hidden_ND)
        return self._output_scores(hidden_ND).float()

    def _output_scores(self, hidden_ND: Tensor) -> Tensor:
        assert self.decoder.output_projection is not None, "there is an adaptive softmax instead"
        weight_VD = self._output_weight()
        if weight_VD is not None:
            return inference_linear.product(hidden_ND, weight_VD)
        scores_NV: Tensor = self.decoder.output_projection(hidden_ND)
        return scores_NV

    def _output_weight(self) -> Tensor | None:
        """Matrix of a full softmax; None where a plug-in's layer may have a bias too, or compute anything."""
        projection = self.decoder.output_projection
        if type(projection) not in (nn.Linear, SharedLinear):
            return None
        weight_VD: Tensor = projection.weight  # type: ignore[union-attr, assignment]
        return weight_VD

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


__getattr__, __dir__ = lazy(__name__)

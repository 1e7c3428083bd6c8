"""GNN-LM: a language model whose output has read its neighbours' contexts (arXiv 2110.08743).

Shapes: B blocks, T positions, N any choice of positions, D width, V types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairseq.memory.gnn.inputs import no_neighbors
from fairseq.memory.gnn.network import GraphNetwork
from fairseq.models.config import TransformerGnnConfig, require_tap
from fairseq.models.outputs import LMOutput
from fairseq.models.transformer_lm import TransformerLanguageModel

if TYPE_CHECKING:
    from fairseq.memory.gnn.inputs import NeighborInputs
    from fairseq.modules.multihead_attention import IncrementalState

_OWN = "gnn."
_SOFTMAX = ("adaptive_softmax", "output_projection")


class GraphLanguageModel(TransformerLanguageModel):
    """A language model, layers over a graph of its neighbours, and the language model's own output layer.

    Its memory key ``model_output`` is what the output layer reads, that is after the graph's layers; ``lm_output`` is
    the language model's state before them.
    """

    extends = TransformerLanguageModel
    config: TransformerGnnConfig
    searched: NeighborInputs | None = None
    """Neighbours of a text that is being generated (``SearchedNeighbors``), where none are given."""
    states_are_given = False
    """True if every batch brings the language model's states: one without rows then computes none either."""

    def __init__(self, config: TransformerGnnConfig, dictionary_size: int, pad: int) -> None:
        """Raises: ValueError when the heads of the graph's layers do not divide their width."""
        super().__init__(config, dictionary_size, pad)
        width = self.decoder.output_width
        self.gnn = GraphNetwork(config, width, config.graph_feature_dim or None)
        if config.train_params != "all":
            self.decoder.requires_grad_(False)
        if config.train_params == "gnn+softmax":  # with tied weights that is the embedding too
            for name in _SOFTMAX:
                if (part := getattr(self.decoder, name)) is not None:
                    part.requires_grad_(True)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        super().reset_parameters()
        self.gnn.reset_parameters()

    def is_own(self, name: str) -> bool:
        """See the base class."""
        return name.startswith(_OWN)

    def train(self, mode: bool = True) -> GraphLanguageModel:
        """As for every module; layers that are not trained drop nothing, except what the output layer reads."""
        super().train(mode)
        if mode and self._is_frozen:
            for name, module in self.decoder.named_children():
                module.train(name in _SOFTMAX)
            self.decoder.training = False
        return self

    @property
    def _is_frozen(self) -> bool:
        return self.config.train_params != "all"

    @property
    def moves_language_model(self) -> bool:
        """True if training changes the language model's states: all of it, or an embedding tied to the output layer."""
        own = [*self.decoder.embed_tokens.parameters(), *self.decoder.layers.parameters()]
        return any(parameter.requires_grad for parameter in own)

    @property
    def may_skip_parameters(self) -> bool:
        """See the base class."""
        return super().may_skip_parameters or self.config.graph_probability < 1

    def forward(
        self,
        tokens_BT: Tensor,
        key_tap: str | None = None,
        incremental_state: IncrementalState | None = None,
        *,
        neighbors: NeighborInputs | None = None,
    ) -> LMOutput:
        """Inner states of every position, which have read the neighbours of the positions up to it.

        Args:
            tokens_BT, key_tap, incremental_state: see ``TransformerLanguageModel``.
            neighbors: those of the tokens; needed unless the model is taken with --short-cut.
        Raises: ValueError when there are none; otherwise as ``TransformerLanguageModel``.
        """
        if key_tap is not None:
            require_tap(key_tap)
        if self.config.short_cut:
            return self._language_model(tokens_BT, key_tap, incremental_state, None)
        neighbors = neighbors or self.searched
        if neighbors is None and len(tokens_BT):
            raise ValueError(
                "this model is a GNN-LM, and it was given no neighbours; give their stores (--graph-stores; in Python "
                "model.searched), or --model-overrides \"{'short_cut': True}\" for its language model alone"
            )
        neighbors = neighbors or no_neighbors(self.gnn, *tokens_BT.shape)  # a batch without rows
        known_BTD = neighbors.known_states()
        if known_BTD is None and self.states_are_given and not len(tokens_BT):
            known_BTD = torch.zeros(*tokens_BT.shape, self.decoder.output_width, device=tokens_BT.device)
        out = self._language_model(tokens_BT, key_tap, incremental_state, known_BTD)
        if self._takes_short_cut():
            return LMOutput(self._paired(out.hidden_BTD, out.hidden_BTD), out.key_BTD)
        read_BUD = neighbors.gather(out.hidden_BTD)
        after_BUD = self.gnn(read_BUD, neighbors.states(self.gnn, read_BUD), incremental_state)
        after_BTD = neighbors.put_back(out.hidden_BTD, after_BUD)
        key_BTD = after_BTD if key_tap == "model_output" else out.key_BTD
        return LMOutput(self._paired(out.hidden_BTD, after_BTD), key_BTD)

    def _language_model(
        self, tokens_BT: Tensor, key_tap: str | None, state: IncrementalState | None, known_BTD: Tensor | None
    ) -> LMOutput:
        """The language model's own output; its states are taken as known where nothing else is asked of it."""
        if known_BTD is not None and key_tap in (None, "model_output", "lm_output"):
            known_BTD = known_BTD.to(next(self.gnn.parameters()).dtype)
            return LMOutput(known_BTD, known_BTD if key_tap else None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_frozen):
            out = super().forward(tokens_BT, key_tap, state)
        return out if known_BTD is None else LMOutput(known_BTD, out.key_BTD)

    def _takes_short_cut(self) -> bool:
        share = self.config.graph_probability
        return self.training and share < 1 and torch.rand(()).item() >= share

    def _paired(self, hidden_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """What the output layer reads: the graph's state, or both that are mixed with --orig-prob-ratio."""
        return torch.cat([hidden_BTD, after_BTD], 2) if self._mixes else after_BTD

    @property
    def _mixes(self) -> bool:
        return self.config.orig_prob_ratio > 0 and not self.config.short_cut

    def _target_logp(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        if not self._mixes:
            return super()._target_logp(hidden_ND, target_N)
        before_ND, after_ND = hidden_ND.chunk(2, 1)
        logp_N, norm_N = super()._target_logp(after_ND, target_N)
        return self._mixed(super()._target_logp(before_ND, target_N)[0], logp_N), norm_N

    def vocab_logp(self, hidden_ND: Tensor) -> Tensor:
        """See the base class."""
        if not self._mixes:
            return super().vocab_logp(hidden_ND)
        before_ND, after_ND = hidden_ND.chunk(2, 1)
        return self._mixed(super().vocab_logp(before_ND), super().vocab_logp(after_ND))

    def vocab_scores(self, hidden_ND: Tensor) -> Tensor:
        """See the base class; with --orig-prob-ratio their log-sum is that of the graph's scores."""
        if not self._mixes:
            return super().vocab_scores(hidden_ND)
        before_ND, after_ND = hidden_ND.chunk(2, 1)
        scores_NV = super().vocab_scores(after_ND)
        norm_N1 = torch.logsumexp(scores_NV, 1, keepdim=True)
        return self._mixed(super().vocab_logp(before_ND), scores_NV - norm_N1) + norm_N1

    def _mixed(self, own: Tensor, of_graph: Tensor) -> Tensor:
        """log(a p + (1 - a) p'), for a of --orig-prob-ratio."""
        share = self.config.orig_prob_ratio
        return torch.logaddexp(own + math.log(share), of_graph + math.log1p(-share))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; those of a language model alone leave the graph's layers as they are."""
        if not any(name.startswith(_OWN) for name in state_dict):
            state_dict = {name: value for name, value in self.state_dict().items() if name.startswith(_OWN)} | dict(
                state_dict
            )
        return super().load_state_dict(state_dict, strict, assign)

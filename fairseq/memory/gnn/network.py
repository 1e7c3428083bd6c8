"""GNN-LM's network: a language model's states in, states that have read their neighbours out, for the same softmax.

Shapes: B blocks, T tokens, K neighbours, P train positions, D width of the model's states, F width of features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.memory.gnn.config import GnnConfig
from fairseq.memory.gnn.graph import NeighborGraph
from fairseq.memory.gnn.layer import NEIGHBOR, TOKEN, GraphAttentionLayer
from fairseq.modules.multihead_attention import IncrementalState


@dataclass(frozen=True)
class NeighborStates:
    """What each layer reads of the neighbours: computed for a batch, or taken from a store of states."""

    state: tuple[Tensor, ...]
    """For each layer, the states (rows, D) before it."""
    index: tuple[Tensor, ...]
    """For each layer, int64 (B, T, K): each neighbour's row; any row for dropped ones."""
    keep_BTK: Tensor
    """bool, False for missing and dropped neighbours."""

    def to(self, device: torch.device | str) -> NeighborStates:
        """The same on another device."""
        state, index = (tuple(part.to(device) for part in parts) for parts in (self.state, self.index))
        return NeighborStates(state, index, self.keep_BTK.to(device))


class GraphNetwork(nn.Module):
    """Heterogeneous graph transformer over a text and its neighbours' contexts (arXiv 2110.08743, sec. 2.3).

    ```python
    network = GraphNetwork(GnnConfig(graph_layer=3, graph_attention_heads=4), dim=64)
    build = GraphBuilder(GraphConfig(), network.num_layers, corpus_length=len(features))
    graph = build(neighbor_BTK)
    hidden_BTD = network(hidden_BTD, network.encode(graph, features.take(graph.position_P)))
    ```
    """

    def __init__(self, config: GnnConfig, dim: int, feature_dim: int | None = None) -> None:
        """Args.

        dim: width of the language model's states.
        feature_dim: width of the train positions' features; that of the states by default.
        Raises: ValueError when the heads do not divide the width.
        """
        super().__init__()
        self.config, self.dim, self.feature_dim = config, dim, feature_dim or dim
        width = config.width(dim)
        self.gcs = nn.ModuleList(
            GraphAttentionLayer(config, dim, is_last=number == config.graph_layer - 1)
            for number in range(config.graph_layer)
        )
        widths = (dim, self.feature_dim)  # in the order of TOKEN and NEIGHBOR
        adapts = any(given != width for given in widths)
        self.adapters = nn.ModuleList(nn.Linear(given, width) for given in widths) if adapts else None
        self.output: nn.Linear | None = None
        if config.graph_start == "zero":
            self.output = nn.Linear(width, dim, bias=False)
            nn.init.zeros_(self.output.weight)
        elif width != dim:
            self.output = nn.Linear(width, dim)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        for layer in self.layers:
            layer.reset_parameters()
        if self.output is not None and self.config.graph_start == "zero":
            nn.init.zeros_(self.output.weight)

    @property
    def num_layers(self) -> int:
        """Layers, and states of a neighbour that they read."""
        return self.config.graph_layer

    @property
    def layers(self) -> list[GraphAttentionLayer]:
        """The layers, the first one first."""
        return [layer for layer in self.gcs if isinstance(layer, GraphAttentionLayer)]

    @property
    def adapts(self) -> bool:
        """True if features are projected before the first layer, because of their width."""
        return self.adapters is not None

    def encode(self, graph: NeighborGraph, feature_PF: Tensor) -> NeighborStates:
        """States of the graph's train positions before each layer.

        Args:
            feature_PF: features of ``graph.position_P``, of any floating type.
        """
        return NeighborStates(self.encode_levels(graph, feature_PF), graph.index, graph.keep_BTK)

    def encode_levels(self, graph: NeighborGraph, feature_PF: Tensor) -> tuple[Tensor, ...]:
        """The same states, without their places. Raises: ValueError for a graph made for another number of layers."""
        if len(graph.levels) != self.num_layers - 1:
            raise ValueError(
                f"the graph was made for {len(graph.levels) + 1} layers, the network has {self.num_layers}; give "
                "GraphBuilder the network's num_layers"
            )
        states = [self.adapted(feature_PF, NEIGHBOR)]
        for layer, level in zip(self.layers, graph.levels):
            states.append(layer.update_neighbors(states[-1], level))
        return tuple(states)

    @property
    def encoder_digest(self) -> str:
        """Identity of the weights that make the neighbours' states, which stored ones belong to."""
        content = hashlib.sha256(f"{self.num_layers} layers of {self.config.graph_attention_heads} heads".encode())
        parts = [value for layer in self.layers[:-1] for value in layer.neighbor_weights()]
        parts += [] if self.adapters is None else list(self.adapters[NEIGHBOR].parameters())
        for value in parts:
            content.update(str(tuple(value.shape)).encode() + value.detach().cpu().double().numpy().tobytes())
        return content.hexdigest()

    def adapted(self, input: Tensor, kind: int) -> Tensor:
        """States before the first layer of a token (0) or of a train position (1)."""
        if self.adapters is None:
            return input
        linear = self.adapters[kind]
        assert isinstance(linear, nn.Linear)
        return F.gelu(linear(input.to(linear.weight.dtype)))

    def forward(
        self, hidden_BTD: Tensor, neighbors: NeighborStates, incremental_state: IncrementalState | None = None
    ) -> Tensor:
        """The states that the softmax reads, (B, T, D); those of padding on the right mean nothing.

        Args:
            hidden_BTD: the language model's states, one per token.
            neighbors: of the same tokens.
            incremental_state: the tokens before, which later calls read; the ones of a generated text come one by one.
        """
        state_BTD = self.adapted(hidden_BTD, TOKEN)
        for number, layer in enumerate(self.layers):
            state_BTD = layer(
                state_BTD,
                neighbors.state[number],
                neighbors.index[number],
                neighbors.keep_BTK,
                incremental_state,
                f"gnn.{number}",
            )
        if self.output is not None:
            state_BTD = self.output(state_BTD)
        return hidden_BTD + state_BTD if self.config.graph_start == "zero" else state_BTD

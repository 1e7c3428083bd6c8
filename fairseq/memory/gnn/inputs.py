"""What a language model reads of its batch's neighbours, whichever way their states are found.

Shapes: B rows, T positions of a row, U positions that the layers read, K neighbours, P train positions, D width of the
model's states, F of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fairseq.memory.gnn.config import GraphConfig
from fairseq.memory.gnn.graph import GraphBuilder, NeighborGraph
from fairseq.memory.gnn.network import GraphNetwork, NeighborStates
from fairseq.memory.sources.external import by_row_where_equal

if TYPE_CHECKING:
    from fairseq.memory.gnn.cached import CachedStates
    from fairseq.memory.gnn.features import NodeFeatures
    from fairseq.memory.index.base import Index


class NeighborInputs(Protocol):
    """Neighbours as a model asks for them."""

    def known_states(self) -> Tensor | None:
        """The language model's own states (B, T, D), where they were computed before; None lets it compute them."""
        ...

    def gather(self, hidden_BTD: Tensor) -> Tensor:
        """The states that the layers read, (B, U, D)."""
        ...

    def states(self, network: GraphNetwork, hidden_BUD: Tensor) -> NeighborStates:
        """Of the neighbours of these states."""
        ...

    def put_back(self, hidden_BTD: Tensor, out_BUD: Tensor) -> Tensor:
        """The layers' output in the place of what they read, (B, T, D)."""
        ...


class FoundNeighbors:
    """Neighbours that are known: of a text whose neighbours were searched before.

    It is no dataclass: Lightning looks into those among a module's inputs, to convert their tensors, and rejects frozen
    ones.
    """

    def __init__(
        self,
        graph: NeighborGraph | None = None,
        feature_PF: Tensor | None = None,
        *,
        cached: NeighborStates | None = None,
        column_BU: Tensor | None = None,
        hidden_BTD: Tensor | None = None,
    ) -> None:
        """Args.

        graph: which train positions are read; None where ``cached`` has the states.
        feature_PF: their features.
        cached: states that were looked up.
        column_BU: int64 positions of each row that the layers read, T for padding; None is all, in order.
        hidden_BTD: the language model's own states, where they were computed before.
        """
        self.graph, self.feature_PF, self.cached = graph, feature_PF, cached
        self.column_BU, self.hidden_BTD = column_BU, hidden_BTD

    def known_states(self) -> Tensor | None:
        """See ``NeighborInputs``."""
        return self.hidden_BTD

    def gather(self, hidden_BTD: Tensor) -> Tensor:
        """See ``NeighborInputs``."""
        if self.column_BU is None:
            return hidden_BTD
        last = hidden_BTD.shape[1] - 1
        return hidden_BTD.gather(1, self.column_BU.clamp(max=last)[:, :, None].expand(-1, -1, hidden_BTD.shape[2]))

    def states(self, network: GraphNetwork, hidden_BUD: Tensor) -> NeighborStates:
        """See ``NeighborInputs``."""
        if self.cached is not None:
            return self.cached
        assert self.graph is not None
        assert self.feature_PF is not None
        return network.encode(self.graph, self.feature_PF)

    def put_back(self, hidden_BTD: Tensor, out_BUD: Tensor) -> Tensor:
        """See ``NeighborInputs``."""
        if self.column_BU is None:
            return out_BUD
        room_BTD = torch.cat([hidden_BTD, hidden_BTD[:, :1]], 1).to(out_BUD.dtype)
        return room_BTD.scatter(1, self.column_BU[:, :, None].expand_as(out_BUD), out_BUD)[:, :-1]

    def to(self, device: torch.device | str) -> FoundNeighbors:
        """The same on another device."""
        moved = {name: None if part is None else part.to(device) for name, part in vars(self).items()}
        return FoundNeighbors(**moved)


def no_neighbors(network: GraphNetwork, num_rows: int, length: int) -> FoundNeighbors:
    """Of tokens that have none.

    The weights that make neighbours' states take part all the same: processes sum the gradients of the same ones.
    """
    graph = GraphBuilder(GraphConfig(), network.num_layers, corpus_length=1)(torch.full((num_rows, length, 1), -1))
    device = next(network.parameters()).device
    feature_PF = torch.zeros(len(graph.position_P), network.feature_dim, device=device)
    return FoundNeighbors(graph.to(device), feature_PF)


@dataclass(frozen=True)
class SearchedNeighbors:
    """Neighbours that are searched as the model reads: of a text that is being generated.

    ```python
    neighbors = SearchedNeighbors(index, k=16, states_of=cached)
    model(tokens_BT, incremental_state=state, neighbors=neighbors)
    ```
    """

    index: Index
    """Over the model's own states of the train positions (``model_output`` of the language model)."""
    k: int
    """Neighbours of a token."""
    states_of: CachedStates | tuple[GraphBuilder, NodeFeatures]
    """Stored states, or what computes them: windows over the train split, and its features."""

    def __post_init__(self) -> None:
        if isinstance(self.states_of, tuple):
            length = self.states_of[0].corpus_length
        else:
            source = self.states_of.source
            length = source.build.corpus_length
            if self.states_of.rows.made_of["weights"] != source.network.encoder_digest:
                raise ValueError("the stored states are of other weights than the network has now; store them again")
        if len(self.index) != length:
            raise ValueError(
                f"the index holds {len(self.index)} positions, the train split has {length}; give an index over its "
                "datastore"
            )

    def known_states(self) -> Tensor | None:
        """None: nothing is known before."""
        return None

    def gather(self, hidden_BTD: Tensor) -> Tensor:
        """All of them."""
        return hidden_BTD

    def states(self, network: GraphNetwork, hidden_BUD: Tensor) -> NeighborStates:
        """See ``NeighborInputs``."""
        query_QD = hidden_BUD.detach().flatten(0, 1).float().cpu().contiguous()
        found = by_row_where_equal(self.index.search(query_QD, self.k))
        neighbor_BUK = found.ids_NK.long().view(*hidden_BUD.shape[:2], -1)
        if not isinstance(self.states_of, tuple):
            if self.states_of.source.network is not network:
                raise ValueError("the stored states are of another network than the model's; store those of its own")
            return self.states_of.lookup(neighbor_BUK)
        build, features = self.states_of
        graph = build(neighbor_BUK)
        feature_PF = features.take(graph.position_P, hidden_BUD.device)
        return network.encode(graph.to(hidden_BUD.device), feature_PF)

    def put_back(self, hidden_BTD: Tensor, out_BUD: Tensor) -> Tensor:
        """All of it."""
        return out_BUD

"""States of all train positions after each layer, computed once: a token then costs its own part alone.

With fixed weights the state of a position depends on the train text only. All layers' states of a position are one row
on disk, so that a neighbour is one read.

Shapes: B blocks, T tokens, K neighbours, U distinct neighbours, N positions of the train split, D width of a state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.features import NodeFeatures
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.network import GraphNetwork, NeighborStates
from fairseq.memory.gnn.row_file import RowFile, RowWriter, existing

POSITIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class StateSource:
    """What states are computed from: a network, features, and windows over the train split."""

    network: GraphNetwork
    features: NodeFeatures
    build: GraphBuilder
    """Of the train split, for tokens of another one: nothing is dropped and no window is cut by a band."""

    def __post_init__(self) -> None:
        if len(self.features) != self.build.corpus_length:
            raise ValueError(
                f"there are features of {len(self.features)} positions and the train split has "
                f"{self.build.corpus_length}; give features of this split"
            )
        if self.features.dim != self.network.feature_dim:
            raise ValueError(
                f"the features are of width {self.features.dim}, the network reads {self.network.feature_dim}; give "
                "the features it was trained with"
            )
        if self.build.config.graph_builder != "occurrence":
            raise ValueError(
                f"--graph-builder {self.build.config.graph_builder}: a state then depends on the block, so that none "
                "can be stored; use occurrence"
            )
        if not self.num_stored:
            raise ValueError(
                "a network of --graph-layer 1 reads the features themselves: there are no states to store; "
                "leave --graph-states out"
            )

    @property
    def num_stored(self) -> int:
        """States per position: one per layer, without the first one's where those are the features."""
        return self.network.num_layers - (0 if self.network.adapts else 1)

    @property
    def width(self) -> int:
        """Width of a state."""
        return self.network.config.width(self.network.dim)

    def made_of(self, codecs: Sequence[ProductQuantizer] = ()) -> dict[str, Any]:
        """What decides the states, plain values."""
        reach = self.network.num_layers - 1
        return {
            "kind": "states",
            "weights": self.network.encoder_digest,
            "features": self.features.digest,
            "window": [min(side, reach) for side in self.build.config.neighbor_context],
            "documents": self.build.document_digest if self.build.config.stop_at_documents else None,
            "codecs": [codec.digest for codec in codecs],
        }

    def states(self, position_U: Tensor) -> tuple[Tensor, ...]:
        """Stored states of some positions, (U, D) for each of ``num_stored`` layers."""
        device = next(self.network.parameters()).device
        graph = self.build(position_U[None, None])
        with torch.no_grad():
            feature_PF = self.features.take(graph.position_P, device)
            graph = graph.to(device)
            states = self.network.encode_levels(graph, feature_PF)
        found = [state.index_select(0, index[0, 0]) for state, index in zip(states, graph.index)]
        return tuple(found[len(found) - self.num_stored :])


def train_state_codecs(
    source: StateSource, num_bytes: int, num_sampled: int = 1 << 16, seed: int = 0
) -> tuple[ProductQuantizer, ...]:
    """A codec for each stored state, learned from the states of a random sample of positions.

    Args:
        num_bytes: bytes of a state.
    Raises: ValueError as :meth:`ProductQuantizer.train`.
    """
    length = source.build.corpus_length
    drawn = np.random.default_rng(seed).choice(length, min(num_sampled, length), replace=False)
    parts = [source.states(part) for part in torch.split(torch.from_numpy(np.sort(drawn)), POSITIONS_AT_ONCE)]
    return tuple(
        ProductQuantizer.train(torch.cat(layer).float().cpu().numpy(), num_bytes, seed=seed) for layer in zip(*parts)
    )


@dataclass(frozen=True)
class CachedStates:
    """Stored states, and the features that stand for those before the first layer.

    ```python
    source = StateSource(network.eval(), features, GraphBuilder(GraphConfig(), network.num_layers, len(features)))
    cached = store_states(source, "states.npy")
    hidden_BTD = network(hidden_BTD, cached.lookup(neighbor_BTK))
    ```
    """

    source: StateSource
    rows: RowFile
    codecs: tuple[ProductQuantizer, ...] = ()
    """One per stored state; none when the states themselves are stored."""

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], source: StateSource, codecs: Sequence[ProductQuantizer] = ()
    ) -> CachedStates:
        """States on disk. Raises: ValueError with both values when they were made of anything else."""
        rows = RowFile.open(path)
        _require_same(path, rows.made_of, source.made_of(codecs))
        if len(rows) != source.build.corpus_length:
            raise ValueError(
                f"{os.fspath(path)} holds states of {len(rows)} positions, the train split has "
                f"{source.build.corpus_length}; store them again"
            )
        return cls(source, rows, tuple(codecs))

    def lookup(self, neighbor_BTK: Tensor) -> NeighborStates:
        """What a network reads of the neighbours of some tokens, on the network's device.

        Args:
            neighbor_BTK: int64 train positions, -1 where none was found.
        Raises: ValueError for a neighbour that is no train position.
        """
        network = self.source.network
        device = next(network.parameters()).device
        keep_BTK = self.source.build.keep(neighbor_BTK)
        position_U, inverse_E = torch.unique(neighbor_BTK[keep_BTK], return_inverse=True)
        position_U = position_U if len(position_U) else torch.zeros(1, dtype=torch.int64)  # a row that nobody reads
        index_BTK = torch.zeros(neighbor_BTK.shape, dtype=torch.int64)
        index_BTK[keep_BTK] = inverse_E
        states = self._decoded(self.rows.take(position_U).to(device))
        if not network.adapts:
            states = (self.source.features.take(position_U, device), *states)
        index_BTK = index_BTK.to(device)
        return NeighborStates(states, (index_BTK,) * len(states), keep_BTK.to(device))

    def _decoded(self, row_UX: Tensor) -> tuple[Tensor, ...]:
        parts = row_UX.chunk(self.source.num_stored, dim=1)
        if not self.codecs:
            return tuple(part.to(torch.float32) for part in parts)
        return tuple(codec.to(row_UX.device).decode(part) for codec, part in zip(self.codecs, parts))


def store_states(
    source: StateSource,
    path: str | os.PathLike[str],
    codecs: Sequence[ProductQuantizer] = (),
    dtype: str = "float16",
) -> CachedStates:
    """Write the states of all train positions, or resume; returns them opened. Complete ones are kept.

    Args:
        codecs: of :func:`train_state_codecs`, to store codes; by default the states themselves are stored.
        dtype: their type then, ``float16`` or ``float32``.
    Raises: ValueError when the network is in training mode, or the file is there and made of something else.
    """
    if source.network.training:
        raise ValueError("the network is in training mode, so that its states are drawn; call network.eval() first")
    length, made_of = source.build.corpus_length, source.made_of(codecs)
    if existing(path, made_of) is None:
        width = sum(codec.num_bytes for codec in codecs) if codecs else source.num_stored * source.width
        with RowWriter(path, length, width, "uint8" if codecs else dtype, made_of) as writer:
            while writer.rows_done < length:
                stop = min(writer.rows_done + POSITIONS_AT_ONCE, length)
                states = source.states(torch.arange(writer.rows_done, stop))
                if codecs:
                    states = tuple(codec.encode(state.cpu()) for codec, state in zip(codecs, states))
                row_UX = torch.cat(states, 1)
                writer.append(row_UX if codecs else row_UX.float())  # numpy has no bfloat16
                writer.checkpoint_when_due()
            writer.finish()
    return CachedStates.open(path, source, codecs)


_FIX = {
    "weights": "store the states of this network again",
    "features": "give the features they were made of, or store them again",
    "window": "give the --neighbor-context they were made with, or store them again",
    "documents": "give the --stop-at-documents and the store they were made with, or store them again",
    "codecs": "give the codecs they were made with, or store them again",
}


def _require_same(path: str | os.PathLike[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name, value in here.items():
        if there.get(name) != value:
            shown = [str(x)[:60] for x in (there.get(name), value)]
            raise ValueError(
                f"{os.fspath(path)} holds states of {name} {shown[0]}, this run has {shown[1]}; "
                f"{_FIX.get(name, 'name another file')}"
            )

"""Batches of text with the neighbours of their tokens, for GNN-LM (arXiv 2110.08743).

Shapes: B rows, T positions of a row, U positions that the graph's layers read, K neighbours, N tokens, R runs of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.data.types import LMBatch
from fairseq.memory.datastore.config import SAVES_TEXT
from fairseq.memory.gnn.inputs import FoundNeighbors

if TYPE_CHECKING:
    from fairseq.data.token_block_dataset import TokenBlockDataset
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.gnn.cached import CachedStates
    from fairseq.memory.gnn.features import NodeFeatures
    from fairseq.memory.gnn.graph import GraphBuilder
    from fairseq.memory.gnn.neighbors import SplitNeighbors

IntArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GraphBatch(LMBatch):
    """Blocks of text with the neighbours of their tokens."""

    neighbors: FoundNeighbors | None = None
    """None in a batch without rows."""

    @property
    def source(self) -> dict[str, Any]:
        """See the base class."""
        return {"neighbors": self.neighbors}

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same batch on another device."""
        moved = super().to(device)
        return moved if moved.neighbors is None else dataclasses.replace(moved, neighbors=moved.neighbors.to(device))


def _spread(count: int) -> IntArray:
    """Some thousand of ``count`` numbers, the first and the last one too."""
    return np.unique(np.linspace(0, count - 1, 4096).astype(np.int64))


def require_same_rows(store: Datastore, other: Datastore) -> None:
    """Raise ValueError unless both stores are of the same text, row by row."""
    texts = [each.metadata.get("text_digest") for each in (store, other)]
    differs = None not in texts and texts[0] != texts[1]
    if len(store) == len(other) and not differs:
        row_N = _spread(len(store))
        differs = bool((store.values.take(row_N) != other.values.take(row_N)).any())
    if len(store) != len(other) or differs:
        raise ValueError(
            f"datastores {store.prefix!r} ({len(store)} rows) and {other.prefix!r} ({len(other)} rows) are not of the "
            "same tokens, row by row; save both from one text, with the same --context-window"
        )


class TextRows:
    """Where the tokens of a split's text are in its datastore."""

    def __init__(self, store: Datastore, blocks: TokenBlockDataset) -> None:
        """Raises: ValueError when the store does not tell, or is of another text."""
        self._num_rows, num_tokens = len(store), len(blocks.tokens)
        runs_R3, unit = store.documents.runs_R3, store.metadata.get("document_unit", "text")
        skipped = 0 if store.metadata.get("all_tokens") else int(store.metadata.get("context_window", 0))
        if len(store) + skipped == num_tokens:
            self._row_R, self._place_R = np.zeros(1, np.int64), np.array([skipped])
        elif unit == "text":
            self._row_R, self._place_R = runs_R3[:, 0], runs_R3[:, 2]
        elif unit == "document" == blocks.document_unit:
            self._row_R, self._place_R = runs_R3[:, 0], blocks.document_starts()[runs_R3[:, 1]] + runs_R3[:, 2]
        else:
            raise ValueError(
                f"datastore {store.prefix!r} has {len(store)} rows of {num_tokens} tokens, cut into {unit}s, and does "
                f"not say where they are in the text; save it with --sample-break-mode none ({SAVES_TEXT})"
            )
        self._require_same_text(store, blocks)

    def _require_same_text(self, store: Datastore, blocks: TokenBlockDataset) -> None:
        """Raise ValueError where tokens of the text are not the store's values; a sample of them is compared."""
        place_N = _spread(len(blocks.tokens))
        row_N = self.find(place_N)
        place_N, row_N = place_N[row_N >= 0], row_N[row_N >= 0]
        differs_N = store.values.take(row_N).numpy() != blocks.tokens[place_N].astype(np.int64)
        if not len(row_N) or differs_N.any():
            what = "no token" if not len(row_N) else f"another token at place {place_N[differs_N][0]}"
            raise ValueError(
                f"datastore {store.prefix!r} is of another text than the split: it has {what}; save it again from this "
                f"data folder ({SAVES_TEXT})"
            )

    def find(self, place_N: IntArray) -> IntArray:
        """Row of each place of the text, -1 where the store has none."""
        run_N = np.searchsorted(self._place_R, place_N, side="right") - 1
        ends_R = np.append(self._row_R[1:], self._num_rows)
        row_N = self._row_R[run_N] + place_N - self._place_R[run_N]
        return np.where((run_N >= 0) & (place_N >= 0) & (row_N < ends_R[run_N]), row_N, -1)


@dataclass(frozen=True)
class NeighborReader:
    """Turns batches of a split into batches with neighbours."""

    rows: TextRows
    neighbors: SplitNeighbors
    k: int
    build: GraphBuilder
    features: NodeFeatures
    is_train: bool
    """True if the split is the one that the neighbours are of."""
    context: int | None
    """Tokens before the scored ones that the layers read; None is all."""
    hidden: Datastore | None
    """The language model's own states of the split's tokens; None lets the model compute them."""
    cached: CachedStates | None
    """Stored states of the train positions; None has them computed from the features."""
    device: Callable[[], torch.device]
    """Where the model is."""

    def read(self, batch: LMBatch, places: Sequence[IntArray]) -> GraphBatch:
        """A batch with its neighbours.

        Args:
            places: for each row the place in the text of the token that each position predicts; -1 for none.
        """
        position_BT = torch.full(batch.tokens_BT.shape, -1)
        for row, place_T in enumerate(places):
            position_BT[row, : len(place_T)] = torch.from_numpy(self.rows.find(place_T))
        column_BU = None if self.context is None else columns(batch.scored_BT, self.context)
        position_BU = position_BT
        if column_BU is not None:
            padded_BT = torch.nn.functional.pad(position_BT, (0, 1), value=-1)
            position_BU = padded_BT.gather(1, column_BU)
        found = self._found(position_BU)
        found.column_BU = column_BU
        found.hidden_BTD = None if self.hidden is None else _states_at(position_BT, self.hidden)
        return GraphBatch(
            batch.ids_B, batch.tokens_BT, batch.target_BT, batch.scored_BT, batch.num_scored, neighbors=found
        )

    def _found(self, position_BU: Tensor) -> FoundNeighbors:
        known_BU = position_BU >= 0
        neighbor_BUK = torch.full((*position_BU.shape, self.k), -1)
        neighbor_BUK[known_BU] = self.neighbors.take(position_BU[known_BU], self.k)
        if self.cached is not None:
            return FoundNeighbors(cached=self.cached.lookup(neighbor_BUK))
        graph = self.build(neighbor_BUK, position_BU if self.is_train else None)
        return FoundNeighbors(graph, self.features.take(graph.position_P, self.device()))


def columns(scored_BT: Tensor, context: int) -> Tensor:
    """int64 (B, U): the scored positions of each row and so many before them; T where a row has fewer than others."""
    length = scored_BT.shape[1]
    place_T = torch.arange(length)
    first_B = torch.where(scored_BT, place_T, length).amin(1)
    end_B = torch.where(scored_BT, place_T + 1, 0).amax(1)
    first_B = (first_B - context).clamp(min=0)
    column_BU = first_B[:, None] + torch.arange(max(1, int((end_B - first_B).max())))
    return column_BU.masked_fill(column_BU >= end_B[:, None], length)


def _states_at(position_BT: Tensor, store: Datastore) -> Tensor:
    known_BT = position_BT >= 0
    hidden_BTD = torch.zeros(*position_BT.shape, store.dim)
    hidden_BTD[known_BT] = store.keys.take(position_BT[known_BT])
    return hidden_BTD

"""The graph of a block of text: which train positions its neighbours read, without any graph objects.

A neighbour's state after i layers depends on the train text alone: on its position, and on how many positions its
window holds to the left and to the right, of which i layers reach i. So equal (position, left, right) are computed once
for all tokens, neighbours and overlapping windows: exactly what a window of its own for each neighbour gives. Corpus
ends, document ends and the band around a train token only make windows shorter.

Shapes: B blocks, T tokens of a block, K neighbours of a token, E kept neighbours, N nodes of a level, P train
positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.memory.datastore.documents import Documents
from fairseq.memory.gnn.config import GraphConfig

ROWS = 64
"""Levels hold a multiple of so many nodes. A row of a matrix product then has the same bits wherever it stands and
however many there are (measured: float64 products of any count that 4 does not divide differ in the last bit), so that
no output depends on what other tokens found."""
CHUNK = 1024
"""Nodes of a level that are computed at once where memory counts."""


@dataclass(frozen=True)
class Level:
    """The states after one more layer: each is made of two or three of the level below."""

    source_N3: Tensor
    """int64 rows of the level below: left of the node, the node, right of it; the node itself where there is none."""
    has_N3: Tensor
    """bool, True where the source exists."""
    chunks: tuple[tuple[int, int, int, int], ...]
    """(first node, end, first source, end): slices of this level and the level below that belong together."""

    def to(self, device: torch.device | str) -> Level:
        """The same on another device."""
        return dataclasses.replace(self, source_N3=self.source_N3.to(device), has_N3=self.has_N3.to(device))


@dataclass(frozen=True)
class NeighborGraph:
    """What the layers read of the neighbours of B blocks."""

    position_P: Tensor
    """int64 train positions whose features are the states before the first layer; the last ones may repeat."""
    levels: tuple[Level, ...]
    """Level i makes the states after layer i + 1 of those after layer i."""
    index: tuple[Tensor, ...]
    """For each layer, int64 (B, T, K): each neighbour's row among the states that layer reads; 0 for dropped ones."""
    keep_BTK: Tensor
    """bool, False for missing and dropped neighbours."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of states before each layer."""
        return (len(self.position_P), *(len(level.has_N3) for level in self.levels))

    def to(self, device: torch.device | str) -> NeighborGraph:
        """The same on another device."""
        return NeighborGraph(
            self.position_P.to(device),
            tuple(level.to(device) for level in self.levels),
            tuple(index.to(device) for index in self.index),
            self.keep_BTK.to(device),
        )


@dataclass(frozen=True)
class _Kept:
    """Kept neighbours: where each centre is and how far its window goes."""

    slot_E: Tensor
    """Train position; of merged blocks, with an offset per block."""
    left_E: Tensor
    right_E: Tensor


class GraphBuilder:
    """Makes the graph of blocks from their neighbours; a few sorts, and no loop over tokens.

    ```python
    build = GraphBuilder(GraphConfig(neighbor_context=(2, 2)), num_layers=3, corpus_length=len(store))
    graph = build(neighbor_BTK)  # of a validation or test split
    graph = build(neighbor_BTK, position_BT)  # of train, whose tokens are at these positions
    ```
    """

    def __init__(
        self, config: GraphConfig, num_layers: int, corpus_length: int, documents: Documents | None = None
    ) -> None:
        """Args.

        num_layers: layers that will read the graph.
        corpus_length: positions of the train split.
        documents: of the train split's positions; for windows and neighbours that stop at them.
        Raises: ValueError when documents are needed and not given.
        """
        if documents is None and (config.stop_at_documents or config.exclude_own_document):
            flag = "--stop-at-documents" if config.stop_at_documents else "--exclude-own-document"
            raise ValueError(f"{flag} needs the documents of the train split, and its store holds none; drop the flag")
        self.config, self.num_layers, self.corpus_length = config, num_layers, corpus_length
        self.document_digest: str | None = None
        self._stride = corpus_length + 1  # of the slots of a block: no window reaches the next block
        if documents is not None:
            runs_R3 = torch.from_numpy(documents.runs_R3.copy())
            self.document_digest = hashlib.sha256(runs_R3.numpy().tobytes()).hexdigest()
            self._start_R, self._document_R = runs_R3[:, 0].contiguous(), runs_R3[:, 1].contiguous()
            self._end_R = torch.cat([self._start_R[1:], torch.tensor([corpus_length])])

    def __call__(self, neighbor_BTK: Tensor, position_BT: Tensor | None = None) -> NeighborGraph:
        """The graph of some blocks.

        Args:
            neighbor_BTK: int64 train positions, -1 where none was found.
            position_BT: int64 positions of the tokens in the train split, -1 for padding; None for any other split,
                of which no neighbour is dropped.
        Raises: ValueError for a neighbour that is no train position.
        """
        keep_BTK = self.keep(neighbor_BTK, position_BT)
        block_E, token_E, _ = keep_BTK.nonzero(as_tuple=True)
        center_E = neighbor_BTK[keep_BTK]
        query_E = None if position_BT is None else position_BT[block_E, token_E]
        if self.config.graph_builder == "dedup":
            kept = self._merged(center_E, block_E)
        else:
            left_E, right_E = self._window(center_E, query_E)
            reach = self.num_layers - 1
            kept = _Kept(center_E, left_E.clamp(max=reach), right_E.clamp(max=reach))
        return self._graph(kept, keep_BTK)

    def keep(self, neighbor_BTK: Tensor, position_BT: Tensor | None = None) -> Tensor:
        """bool (B, T, K): False where a neighbour is missing, in the band, or of a document that is excluded.

        Raises: ValueError for a neighbour that is no train position.
        """
        if neighbor_BTK.numel():
            low, high = (int(bound) for bound in neighbor_BTK.aminmax())
            if low < -1 or high >= self.corpus_length:
                wrong = high if high >= self.corpus_length else low
                raise ValueError(
                    f"neighbour {wrong} is no position of the train split of {self.corpus_length} tokens (0 to "
                    f"{self.corpus_length - 1}, or -1 for none); give neighbours searched in this split"
                )
        keep_BTK = neighbor_BTK >= 0
        if position_BT is None:
            return keep_BTK
        position_BT1 = position_BT[:, :, None]
        keep_BTK &= (neighbor_BTK - position_BT1).abs() >= self.config.nearest
        keep_BTK &= position_BT1 >= 0
        if self.config.exclude_own_document:
            keep_BTK &= self._document(neighbor_BTK) != self._document(position_BT1)
        return keep_BTK

    def _document(self, position: Tensor) -> Tensor:
        return self._document_R[self._run(position.clamp(min=0))]

    def _run(self, position: Tensor) -> Tensor:
        return torch.searchsorted(self._start_R, position.contiguous(), right=True) - 1

    def _window(self, center_E: Tensor, query_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions to the left and to the right of each centre that its window holds."""
        left, right = self.config.neighbor_context
        left_E = center_E.clamp(max=left)
        right_E = (self.corpus_length - 1 - center_E).clamp(max=right)
        if self.config.stop_at_documents:
            run_E = self._run(center_E)
            left_E = torch.minimum(left_E, center_E - self._start_R[run_E])
            right_E = torch.minimum(right_E, self._end_R[run_E] - 1 - center_E)
        if query_E is not None and not self.config.windows_cross_band:
            beyond_E = (center_E - query_E).abs() - self.config.nearest
            # A band of 0 drops nothing, so that neither side may be cut by it.
            after_E, cuts = center_E > query_E, self.config.nearest > 0
            left_E = torch.where(after_E & cuts, torch.minimum(left_E, beyond_E), left_E)
            right_E = torch.where(~after_E & cuts, torch.minimum(right_E, beyond_E), right_E)
        return left_E, right_E

    def _merged(self, center_E: Tensor, block_E: Tensor) -> _Kept:
        """Windows of the reference's merged graph: what is present in a block reaches on as long as it is connected."""
        left, right = self.config.neighbor_context
        offset_W = torch.arange(-left, right + 1)
        left_E, right_E = self._window(center_E, None)
        inside_EW = (offset_W >= -left_E[:, None]) & (offset_W <= right_E[:, None])
        slot_E = center_E + block_E * self._stride
        slot_P = torch.unique((slot_E[:, None] + offset_W)[inside_EW])
        begins_P = torch.ones(len(slot_P), dtype=torch.bool)
        begins_P[1:] = slot_P.diff() > 1
        if self.config.stop_at_documents:
            begins_P[1:] |= self._run(slot_P % self._stride).diff() != 0
        first_C = begins_P.nonzero()[:, 0]
        last_C = torch.cat([first_C[1:], torch.tensor([len(slot_P)])]) - 1
        component_E = begins_P.cumsum(0)[torch.searchsorted(slot_P, slot_E)] - 1
        reach = self.num_layers - 1
        return _Kept(
            slot_E,
            (slot_E - slot_P[first_C[component_E]]).clamp(max=reach),
            (slot_P[last_C[component_E]] - slot_E).clamp(max=reach),
        )

    def _graph(self, kept: _Kept, keep_BTK: Tensor) -> NeighborGraph:
        """Levels from the last to the first: a level holds what the one above it is made of."""
        nodes = _Nodes(self.num_layers)
        code_N, row_E = torch.unique(nodes.encode(kept.slot_E, kept.left_E, kept.right_E), return_inverse=True)
        code_N = _padded(code_N)
        levels, rows = [], [row_E]
        for reach in reversed(range(self.num_layers - 1)):
            source_N3, has_N3 = nodes.sources(code_N, reach)
            below_M, row_N3 = torch.unique(source_N3, return_inverse=True)
            below_M = _padded(below_M)
            levels.append(Level(row_N3, has_N3, _chunks(row_N3, len(below_M))))
            rows.append(row_N3[rows[-1], 1])
            code_N = below_M
        slot_P = nodes.decode(code_N)[0]
        index = []
        for row_E in reversed(rows):
            index_BTK = torch.zeros(keep_BTK.shape, dtype=torch.int64)
            index_BTK[keep_BTK] = row_E
            index.append(index_BTK)
        position_P = slot_P % self._stride if self.config.graph_builder == "dedup" else slot_P
        return NeighborGraph(position_P, tuple(reversed(levels)), tuple(index), keep_BTK)


class _Nodes:
    """Nodes as single numbers that sort by slot, so that the sources of consecutive nodes are consecutive too."""

    def __init__(self, num_layers: int) -> None:
        self._base = num_layers

    def encode(self, slot: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (slot * self._base + left) * self._base + right

    def decode(self, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = torch.div(code, self._base, rounding_mode="floor")
        return torch.div(rest, self._base, rounding_mode="floor"), rest % self._base, code % self._base

    def sources(self, code_N: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Codes (N, 3) of the nodes to the left, here and to the right, whose windows reach ``reach`` at most."""
        slot_N, left_N, right_N = self.decode(code_N)
        has_N3 = torch.stack([left_N > 0, torch.ones_like(left_N, dtype=torch.bool), right_N > 0], 1)
        own_N = self.encode(slot_N, left_N.clamp(max=reach), right_N.clamp(max=reach))
        before_N = self.encode(slot_N - 1, (left_N - 1).clamp(max=reach), (right_N + 1).clamp(max=reach))
        after_N = self.encode(slot_N + 1, (left_N + 1).clamp(max=reach), (right_N - 1).clamp(max=reach))
        code_N3 = torch.stack([before_N, own_N, after_N], 1)
        return torch.where(has_N3, code_N3, own_N[:, None]), has_N3


def _padded(code_N: Tensor) -> Tensor:
    """A multiple of ROWS codes, the last one repeated; at least one ROWS, of node 0 when there is none."""
    last = code_N[-1:] if len(code_N) else torch.zeros(1, dtype=torch.int64)
    missing = max(ROWS, -(-len(code_N) // ROWS) * ROWS) - len(code_N)
    return torch.cat([code_N, last.expand(missing)])


def _chunks(source_N3: Tensor, num_sources: int) -> tuple[tuple[int, int, int, int], ...]:
    """Slices of nodes and of their sources, whose ends are multiples of ROWS."""
    chunks = []
    for start in range(0, len(source_N3), CHUNK):
        stop = min(start + CHUNK, len(source_N3))
        low, high = (int(bound) for bound in source_N3[start:stop].aminmax())
        chunks.append((start, stop, low // ROWS * ROWS, min(num_sources, (high // ROWS + 1) * ROWS)))
    return tuple(chunks)

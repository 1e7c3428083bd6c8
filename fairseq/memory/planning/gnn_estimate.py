"""Cost of GNN-LM over a datastore, before any of it is made: bytes by formula, seconds by measured rates.

n train positions (``--keys``) of width d; L layers, H heads, windows of l and r positions to the sides, of which layers
read L - 1 at most; m bytes of a code; k neighbours of a token, of which a share s (``--gnn-distinct``) are distinct
positions; T tokens of a block. Bytes of files, each with the header of ``.npy`` where ours writes one:

| what | bytes |
|---|---|
| features: keys in float16, or codes | 2 n d, or n m |
| neighbours of the train split: row numbers alone, no distances | 4 n k, and 8 n k from 2^31 positions on |
| states of all positions: float16, or codes | 2 n (L - 1) d, or n (L - 1) m |

FLOP of a token's forward pass, those of matrix products (a multiplication and an addition are two):

- of its own, in each layer 12 d^2 + 4 k H d + 4 T d, and 2 d^2 of the output;
- of each of its s k distinct neighbours, in each layer i < L, 4 (w(L - 1 - i) + w(L - i)) d^2, where
  w(x) = 1 + min(l, x) + min(r, x) positions are no further than x from a neighbour;
- of the block, divided by T, 12 d^2 (d + 1) / H in each layer, and 8 in place of 12 in the last.

Training takes three times as many at most: the features need no gradients.

Seconds: a search takes what ``estimate.py`` says for n queries, with rates measured at each k; encoding and states take
a measured time per position, besides reading the float16 keys and writing the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fairseq.memory.gnn.neighbors import neighbor_dtype
from fairseq.memory.gnn.row_file import file_bytes
from fairseq.memory.planning.config import PlanConfig
from fairseq.memory.planning.estimate import Rates, plan

TRAINING = 3
"""Training over a forward pass, at most: the backward pass computes two products for each."""


@dataclass(frozen=True)
class GnnRates:
    """Rates measured on this machine."""

    encode_key: float
    """Seconds to encode a vector, besides reading and writing."""
    state_position: float
    """Seconds to compute the states of a position, likewise; 0 for a network that has none."""
    search: Mapping[int, Rates]
    """For each k, rates measured with searches for so many neighbours."""


@dataclass(frozen=True)
class Part:
    """A file, and how long it takes to make."""

    name: str
    bytes: int
    seconds: float
    """Of reading, computing and writing; a search's own time is in :class:`Depth`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return dict(vars(self))


@dataclass(frozen=True)
class Depth:
    """What a number of neighbours costs."""

    k: int
    neighbors: Part
    search_seconds: Mapping[str, float | None]
    """Of all train positions' neighbours, by kind of index; None if the kind cannot be measured."""
    forward_flop: float
    """Of a token."""
    training_flop: float
    """Of a token, at most."""
    epoch_seconds: float
    feature_bytes: Mapping[str, float]
    """Read for a token of training, by kind of features."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        plain = {"search_seconds": dict(self.search_seconds), "feature_bytes": dict(self.feature_bytes)}
        return vars(self) | plain | {"neighbors": self.neighbors.to_dict()}


@dataclass(frozen=True)
class GnnPlan:
    """Files that do not depend on k, and what each k costs."""

    parts: tuple[Part, ...]
    depths: tuple[Depth, ...]
    flops: float
    """FLOP per second that the times of training assume."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return {
            "parts": [part.to_dict() for part in self.parts],
            "depths": [depth.to_dict() for depth in self.depths],
            "flops": self.flops,
        }


def gnn_plan(config: PlanConfig, rates: GnnRates, memory_bytes: int) -> GnnPlan:
    """Estimate GNN-LM's parts over the keys of a config.

    Args:
        memory_bytes: RAM of the machine; keys that fit are read from disk once in a search.
    """
    disk = next(iter(rates.search.values()))
    flops = config.flops or disk.matmul
    depths = tuple(_depth(config, k, rates.search[k], flops, memory_bytes) for k in config.gnn_k)
    return GnnPlan(_parts(config, rates, disk), depths, flops)


def _parts(config: PlanConfig, rates: GnnRates, disk: Rates) -> tuple[Part, ...]:
    rows, width, states = config.keys, config.gnn_code_bytes, config.graph_layers - 1

    def part(name: str, num_bytes: int, per_row: float | None) -> Part:
        reading = 0.0 if per_row is None else 2 * rows * config.dim / disk.read_bytes + rows * per_row
        return Part(name, num_bytes, reading + num_bytes / disk.write_bytes)

    found = [
        part("features, float16", 2 * rows * config.dim, None),
        part("features, codes", file_bytes(rows, width, "uint8"), rates.encode_key),
    ]
    if states:
        coded_state = rates.state_position + states * rates.encode_key
        found += [
            part("states, float16", file_bytes(rows, states * config.dim, "float16"), rates.state_position),
            part("states, codes", file_bytes(rows, states * width, "uint8"), coded_state),
        ]
    return tuple(found)


def _depth(config: PlanConfig, k: int, rates: Rates, flops: float, memory_bytes: int) -> Depth:
    dtype = neighbor_dtype(config.keys)
    size = file_bytes(config.keys, k, dtype)
    found = plan(replace(config, queries=config.keys, k=k), rates, memory_bytes)
    forward = forward_flop(config, k)
    positions = config.gnn_distinct * k * _positions(config, config.graph_layers - 1)
    return Depth(
        k,
        Part(f"neighbours, k {k}, {dtype}", size, size / rates.write_bytes),
        {choice.kind: choice.search_seconds for choice in found.choices},
        forward,
        TRAINING * forward,
        TRAINING * forward * config.keys / flops,
        {"float16": 2 * config.dim * positions, "codes": config.gnn_code_bytes * positions},
    )


def _positions(config: PlanConfig, reach: int) -> int:
    """Positions of a window that are no further than ``reach`` from its centre."""
    left, right = config.graph.neighbor_context
    return 1 + min(left, reach) + min(right, reach)


def forward_flop(config: PlanConfig, k: int) -> float:
    """FLOP of a token's forward pass, as the module's docstring counts them."""
    dim, heads, layers, tokens = config.dim, config.graph_heads, config.graph_layers, config.gnn_tokens
    own = layers * (12 * dim**2 + 4 * k * heads * dim + 4 * tokens * dim) + 2 * dim**2
    nodes = [_positions(config, layers - i) + _positions(config, layers - 1 - i) for i in range(1, layers)]
    shared = (12 * layers - 4) * dim**2 * (dim + 1) / heads / tokens
    return own + config.gnn_distinct * k * 4 * sum(nodes) * dim**2 + shared

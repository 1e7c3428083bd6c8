"""Speed of this machine at GNN-LM's own steps, and at searches for neighbours, for a plan."""

from __future__ import annotations

import numpy as np
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.gnn.cached import POSITIONS_AT_ONCE, StateSource
from fairseq.memory.gnn.codec import CENTROIDS, ProductQuantizer
from fairseq.memory.gnn.features import KeyFeatures
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.network import GraphNetwork
from fairseq.memory.planning.config import PlanConfig
from fairseq.memory.planning.estimate import Rates
from fairseq.memory.planning.gnn_estimate import GnnRates
from fairseq.memory.planning.measure import measure_each, random_keys, seconds_of

_ROWS = 4096


def measure_with_gnn(config: PlanConfig) -> tuple[Rates, GnnRates]:
    """Rates of a datastore's plan, and of GNN-LM's with a search at each of its k.

    Raises: OSError when the folder cannot be written.
    """
    found = measure_each(config, sorted({config.k, *config.gnn_k}))
    gnn = GnnRates(_encode_key(config), _state_position(config), {k: found[k] for k in config.gnn_k})
    return found[config.k], gnn


def _keys(config: PlanConfig, rows: int) -> torch.Tensor:
    return torch.from_numpy(random_keys(np.random.default_rng(2), rows, config.dim))


def _encode_key(config: PlanConfig) -> float:
    """Seconds per key. The time does not depend on what the codec learned: centroids are keys, any rotation will do."""
    key_ND = _keys(config, _ROWS)
    part_MNW = key_ND.view(_ROWS, config.gnn_code_bytes, -1).transpose(0, 1)
    codec = ProductQuantizer(part_MNW[:, :CENTROIDS].contiguous(), torch.eye(config.dim), torch.zeros(config.dim))
    codec.encode(key_ND[:256])
    return min(seconds_of(lambda: codec.encode(key_ND)) for _ in range(2)) / _ROWS


def _state_position(config: PlanConfig) -> float:
    """Seconds per position of a network with the weights it starts from."""
    if config.graph_layers == 1:
        return 0.0
    key_ND = _keys(config, POSITIONS_AT_ONCE).half().numpy()
    network = GraphNetwork(config.network, config.dim).eval()
    build = GraphBuilder(config.graph, config.graph_layers, POSITIONS_AT_ONCE)
    source = StateSource(network, KeyFeatures(ChunkedArray([key_ND]), "made up"), build)
    source.states(torch.arange(64))
    position_U = torch.arange(POSITIONS_AT_ONCE)
    return min(seconds_of(lambda: source.states(position_U)) for _ in range(2)) / POSITIONS_AT_ONCE

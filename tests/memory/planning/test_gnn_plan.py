"""GNN-LM's plan against files that are really written, products that are really computed, and sums by hand."""

import json

import pytest
import torch
from test_plan import RATES, config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn.cached import StateSource, store_states
from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.config import GnnConfig, GraphConfig
from fairseq.memory.gnn.features import KeyFeatures, encode_store
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.neighbors import search_split
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.memory.gnn.network import GraphNetwork
from fairseq.memory.planning.gnn_estimate import GnnRates, forward_flop, gnn_plan
from fairseq.memory.planning.gnn_measure import measure_with_gnn
from fairseq.memory.planning.gnn_table import gnn_table
from fairseq_cli import datastore

GNN_RATES = GnnRates(1e-3, 1e-2, dict.fromkeys((10, 32, 1024), RATES))


def gnn(**more):
    return config(**{"gnn_k": (10,), "graph_heads": 4, "gnn_code_bytes": 8} | more)


def test_bytes_are_those_of_a_slice_with_the_widths_of_a_large_model(tmp_path, monkeypatch):
    """Every file of GNN-LM over 1,100 positions at width 1024, k 1024, three layers of eight heads, 128-byte codes."""
    monkeypatch.setattr(GraphNetwork, "encoder_digest", "one network")  # or half of the time goes to its digests
    rows, dim, k = 1100, 1024, 1024
    generator = torch.Generator().manual_seed(0)
    keys_ND = torch.randn(rows, dim, generator=generator)
    with DatastoreWriter(tmp_path / "train", rows, dim, "float16") as writer:
        writer.append(keys_ND, torch.zeros(rows, dtype=torch.int64))
        writer.finish()
    store = Datastore.open(tmp_path / "train")
    codec = ProductQuantizer(torch.randn(128, 256, 8, generator=generator), torch.eye(dim))
    encode_store(store, codec, tmp_path / "codes.npy")
    search_split(
        NeighborsConfig(queries=str(tmp_path / "train"), dstore_filename=str(tmp_path / "train"), num_neighbors=k)
    )
    network = GraphNetwork(GnnConfig(graph_attention_heads=8), dim).eval()
    source = StateSource(network, KeyFeatures.of(store), GraphBuilder(GraphConfig(), 3, rows))
    cached = store_states(source, tmp_path / "states.npy")
    store_states(source, tmp_path / "coded.npy", [codec, codec])
    with torch.no_grad():
        out = network(keys_ND[None, :2], cached.lookup(torch.arange(2 * k).view(1, 2, k) % rows))
    assert out.shape == (1, 2, dim)

    made = gnn_plan(gnn(keys=rows, dim=dim, gnn_k=(k,), graph_heads=8, gnn_code_bytes=128), GNN_RATES, 1 << 34)
    sizes = {part.name: part.bytes for part in (*made.parts, *(depth.neighbors for depth in made.depths))}
    files = {
        "features, float16": tmp_path / "train-fp16_keys.npy",
        "features, codes": tmp_path / "codes.npy",
        "states, float16": tmp_path / "states.npy",
        "states, codes": tmp_path / "coded.npy",
        "neighbours, k 1024, int32": tmp_path / "train.neighbors",
    }
    assert sizes == {name: path.stat().st_size for name, path in files.items()}


def test_row_numbers_become_wider_where_32_bits_do_not_count_them():
    for keys, size in ((2**31 - 1, 4), (2**31, 8)):
        (depth,) = gnn_plan(gnn(keys=keys, ncentroids=8), GNN_RATES, 1 << 34).depths
        assert depth.neighbors.bytes == 128 + size * 10 * keys


@pytest.mark.parametrize("sides", [(0, 0), (1, 2), (5, 5)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_flop_are_the_products_of_a_step(sides, layers):
    tokens, k, dim, corpus = 16, 12, 32, 4000
    planned = gnn(gnn_k=(k,), neighbor_context=sides, graph_layers=layers, gnn_tokens=tokens)
    network = GraphNetwork(GnnConfig(graph_layer=layers, graph_attention_heads=4), dim).double()
    # So far apart that no window touches another one, and as many as the levels' sizes are rounded to.
    neighbors_BTK = (torch.arange(tokens * k) * 20 + 10).view(1, tokens, k)
    graph = GraphBuilder(GraphConfig(neighbor_context=sides), layers, corpus)(neighbors_BTK)
    feature_PD = torch.randn(len(graph.position_P), dim, dtype=torch.float64)
    hidden_BTD = torch.randn(1, tokens, dim, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        out = network(hidden_BTD, network.encode(graph, feature_PD))
    assert counted.get_total_flops() == pytest.approx(tokens * forward_flop(planned, k), rel=1e-9)
    with FlopCounterMode(display=False) as again:
        out.square().sum().backward()
    training = (counted.get_total_flops() + again.get_total_flops()) / tokens
    (depth,) = gnn_plan(planned, GnnRates(0, 0, {k: RATES}), 1 << 34).depths
    # Features have no gradients, and what is not trained none either.
    assert 0.75 < training / depth.training_flop <= 1


def test_seconds_by_hand():
    wanted = gnn(keys=1_000_000, train_size=70_000, ncentroids=1000, dim=64)
    made = gnn_plan(wanted, GNN_RATES, 1 << 40)
    seconds = {part.name: part.seconds for part in made.parts}
    reading = 2 * 64e6 / 2e9
    assert seconds == {
        "features, float16": pytest.approx(2 * 64e6 / 1e9),
        "features, codes": pytest.approx(reading + 1e6 * 1e-3 + 8e6 / 1e9, rel=1e-6),
        "states, float16": pytest.approx(reading + 1e6 * 1e-2 + 4 * 64e6 / 1e9, rel=1e-6),
        "states, codes": pytest.approx(reading + 1e6 * (1e-2 + 2e-3) + 16e6 / 1e9, rel=1e-6),
    }
    (depth,) = made.depths
    assert depth.search_seconds["exact"] == pytest.approx(1e6 * (1e-10 * 1e6 + 1e-4))
    assert depth.search_seconds["ivfrabitq"] is None
    assert depth.training_flop == 3 * depth.forward_flop
    assert depth.epoch_seconds == pytest.approx(depth.training_flop * 1e6 / 1e11)
    assert depth.feature_bytes == {"float16": 10 * 5 * 128, "codes": 10 * 5 * 8}
    (faster,) = gnn_plan(gnn(keys=1_000_000, dim=64, flops=1e14), GNN_RATES, 1 << 40).depths
    assert faster.epoch_seconds == pytest.approx(depth.epoch_seconds / 1000)


def test_distinct_neighbors_alone_are_paid_for():
    (all_distinct,) = gnn_plan(gnn(), GNN_RATES, 1 << 34).depths
    (half,) = gnn_plan(gnn(gnn_distinct=0.5), GNN_RATES, 1 << 34).depths
    encoding = 10 * 4 * (5 + 3 + 3 + 1) * 32**2
    assert all_distinct.forward_flop - half.forward_flop == pytest.approx(encoding / 2)
    assert half.feature_bytes["codes"] == all_distinct.feature_bytes["codes"] / 2


def test_the_command_measures_and_prints_both_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fairseq.memory.planning.measure._DISK_BYTES", 16 << 20)
    monkeypatch.setattr("fairseq.memory.planning.measure._KEY_BYTES", 1 << 10)
    monkeypatch.setattr("fairseq.memory.planning.measure.INDEXES", {})
    rates, measured = measure_with_gnn(gnn(gnn_k=(4, 10), dim=16, folder=str(tmp_path), code_size=2))
    assert set(measured.search) == {4, 10}
    assert 0 < measured.encode_key < 0.1
    assert 0 < measured.state_position < 0.1
    assert rates is measured.search[10]
    monkeypatch.setattr("fairseq.memory.planning.gnn_measure.measure_with_gnn", lambda config: (rates, measured))
    words = "plan --keys 4000 --dim 16 --ncentroids 8 --code-size 2 --k 10 --gnn-k 4,10 --gnn-code-bytes 4".split()
    words += ["--folder", str(tmp_path), "--flops", "1e12"]
    datastore.main(words)
    told = capsys.readouterr().out
    assert "GNN-LM over 4000 positions of width 16: 3 layers, 8 heads, windows of 2 and 2 positions" in told
    assert "an epoch at 1,000 GFLOP/s, --flops, not measured" in told
    assert [line.split()[3] for line in told.splitlines() if line.startswith("neighbours")] == ["int32"] * 2
    datastore.main([*words, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert [depth["k"] for depth in figures["gnn"]["depths"]] == [4, 10]
    assert figures["gnn"]["parts"][1]["bytes"] == 128 + 4 * 4000
    assert figures["gnn_rates"]["encode_key"] == measured.encode_key


def test_what_exceeds_the_disk_is_marked():
    wanted = gnn(keys=10**15, graph_layers=1)
    table = gnn_table(wanted, gnn_plan(wanted, GNN_RATES, 1 << 34))
    assert "!: more than the disk has free" in table
    assert "states" not in table
    assert "!" not in gnn_table(gnn(), gnn_plan(gnn(), GNN_RATES, 1 << 34))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gnn_k": (32, 5000)}, "--gnn-k must be at most 4000, got 5000; there are --keys 4000"),
        ({"gnn_k": (0, 5)}, "--gnn-k must be at least 1, got 0"),
        ({"gnn_code_bytes": 12}, "--gnn-code-bytes 12 does not divide the width 32; give 8, for example"),
        ({"graph_heads": 5}, "--graph-attention-heads 5 does not divide the width 32"),
        ({"neighbor_context": (1, 2, 3)}, r"--neighbor-context \(1, 2, 3\) is not one number or two"),
        ({"gnn_distinct": 1.5}, "--gnn-distinct must be at most 1, got 1.5; it is a share"),
        ({"flops": 0.0}, "--flops must be at least 1, got 0.0"),
    ],
)
def test_impossible_plans(given, message):
    with pytest.raises(ValueError, match=message):
        gnn(**given)

"""The network against one that draws every node and edge, and against the published program's stored run."""

import os
from pathlib import Path

import pytest
import torch
from largest_tensor import LargestTensor
from plain_hgt import kept, merged_graph, occurrence_graph, plain_hgt

from fairseq.memory.gnn.config import GnnConfig, GraphConfig
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.network import GraphNetwork
from fairseq.modules.multihead_attention import IncrementalState

LENGTH, DIM, HEADS, FIRST, BAND = 60, 16, 2, 20, 8
SIDES = [(left, right) for left in range(4) for right in range(4)]
# Itself, none, both ends of the corpus, both sides of the band, shared and adjacent ones, and a token with none.
NEIGHBORS = [
    [20, 0, 59, 40, -1],
    [40, 41, 42, 50, 52],
    [-1, 21, 23, 29, -1],
    [31, 32, 33, 13, 12],
    [58, 57, 1, 40, 45],
    [17, 33, 34, 48, 47],
]
TOKENS = len(NEIGHBORS)


def rows(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_network(dtype=torch.float64, seed=0, layers=3, dim=DIM, **options):
    """Every weight drawn, those that start at one or at zero too."""
    given = {"graph_dropout": 0.0, "graph_attention_dropout": 0.0, "graph_start": "reference"} | options
    network = GraphNetwork(GnnConfig(graph_layer=layers, graph_attention_heads=HEADS, **given), dim).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) / 4
        value.copy_(drawn + (1 if "norms" in name or "pri" in name else 0))
    return network


def build_graph(sides=(2, 2), neighbors=NEIGHBORS, layers=3, first=FIRST, **options):
    config = GraphConfig(**{"neighbor_context": sides, "band": BAND} | options)
    position = None if first is None else torch.arange(first, first + len(neighbors))[None]
    return GraphBuilder(config, layers, LENGTH)(torch.tensor([neighbors]), position)


def run(network, graph, hidden, features, **more):
    return network(hidden[None], network.encode(graph, features[graph.position_P]), **more)[0]


def weighted_sum(out):
    return (out.flatten() * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum()


def plain_graph(builder, sides, cross=True):
    pairs = kept(NEIGHBORS, LENGTH, BAND, FIRST)
    if builder == "dedup":
        return merged_graph(pairs, TOKENS, *sides, LENGTH)
    return occurrence_graph(pairs, TOKENS, *sides, LENGTH, band=None if cross else BAND, first=FIRST)


@pytest.mark.parametrize("builder", ["occurrence", "dedup"])
@pytest.mark.parametrize("sides", [(0, 0), (1, 1), (2, 2), (0, 3), (2, 1)])
def test_outputs_and_gradients_are_those_of_every_node_and_edge(builder, sides):
    network, hidden, features = make_network(), rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    hidden.requires_grad_(), features.requires_grad_()
    plain = {name: value.detach().clone().requires_grad_() for name, value in network.state_dict().items()}
    out = run(network, build_graph(sides, graph_builder=builder, windows_cross_band=True), hidden, features)
    found = torch.autograd.grad(weighted_sum(out), [hidden, features], retain_graph=True)
    weighted_sum(out).backward(inputs=[p for p in network.parameters() if p.requires_grad])
    graph = plain_graph(builder, sides)
    wanted, _ = plain_hgt(plain, 3, HEADS, hidden, features[graph.position], graph)
    assert (out - wanted).abs().max() < 1e-12
    inputs = torch.autograd.grad(weighted_sum(wanted), [hidden, features, *plain.values()], allow_unused=True)
    for ours, theirs in zip(found, inputs):
        assert (ours - theirs).abs().max() < 1e-12
    ours = dict(network.named_parameters())
    for name, gradient in zip(plain, inputs[2:]):
        own = ours[name].grad if name in ours else None
        if gradient is not None:  # the bias of the last layer's keys shifts all scores alike
            own = torch.zeros_like(gradient) if own is None else own
            assert (own - gradient).abs().max() < 1e-12, name
        else:
            assert own is None or not own.any(), name


@pytest.mark.parametrize("sides", SIDES)
def test_windows_end_at_the_band(sides):
    network, hidden, features = make_network(), rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    graph = plain_graph("occurrence", sides, cross=False)
    wanted, _ = plain_hgt(network.state_dict(), 3, HEADS, hidden, features[graph.position], graph)
    with torch.no_grad():
        assert (run(network, build_graph(sides), hidden, features) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_number_of_layers(layers):
    network, hidden, features = make_network(layers=layers), rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    graph = plain_graph("occurrence", (2, 2))
    wanted, _ = plain_hgt(network.state_dict(), layers, HEADS, hidden, features[graph.position], graph)
    ours = build_graph(layers=layers, windows_cross_band=True)
    with torch.no_grad():
        assert (run(network, ours, hidden, features) - wanted).abs().max() < 1e-12


def test_blocks_of_a_batch_do_not_meet():
    network, features = make_network(), rows(LENGTH, DIM, seed=2)
    hidden = rows(2, TOKENS, DIM, seed=1)
    neighbors = torch.tensor([NEIGHBORS, NEIGHBORS[::-1]])
    position = torch.stack([torch.arange(20, 20 + TOKENS), torch.arange(7, 7 + TOKENS)])
    for builder in ("occurrence", "dedup"):
        build = GraphBuilder(GraphConfig(band=BAND, graph_builder=builder, neighbor_context=(1, 0)), 3, LENGTH)
        graph = build(neighbors, position)
        with torch.no_grad():
            both = network(hidden, network.encode(graph, features[graph.position_P]))
            for block in range(2):
                own = build(neighbors[block, None], position[block, None])
                assert (run(network, own, hidden[block], features) - both[block]).abs().max() < 1e-12


def test_tokens_read_only_their_neighbours_without_intra_edges():
    network, hidden, features = make_network(no_intra_edges=True), rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    graph = plain_graph("occurrence", (2, 2))
    wanted, _ = plain_hgt(network.state_dict(), 3, HEADS, hidden, features[graph.position], graph, intra=False)
    with torch.no_grad():
        out = run(network, build_graph(windows_cross_band=True), hidden, features)
    assert (out - wanted).abs().max() < 1e-12


def test_a_token_sees_as_much_of_its_text_as_is_asked_for():
    hidden, features = rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    network = make_network(intra_context=2)
    graph = plain_graph("occurrence", (2, 2))
    graph.text = [(u, v) for u, v in graph.text if v - u < 2]
    wanted, _ = plain_hgt(network.state_dict(), 3, HEADS, hidden, features[graph.position], graph)
    with torch.no_grad():
        assert (run(network, build_graph(windows_cross_band=True), hidden, features) - wanted).abs().max() < 1e-12


def test_the_mean_may_be_of_what_is_present():
    hidden, features = rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    alone = [[-1, -1]] * TOKENS
    by_two, present, learned = (make_network(graph_mean=mean) for mean in ("two", "present", "learned"))
    mixing = {f"gcs.{number}.mixing": torch.zeros(HEADS) for number in range(3)}
    learned.load_state_dict(by_two.state_dict() | mixing)
    with torch.no_grad():
        halves = [run(network, build_graph(), hidden, features) for network in (by_two, learned)]
        assert torch.allclose(*halves, atol=1e-12)
        for layer in by_two.gcs:  # twice the message, which the mean by two halves
            layer.a_linears[0].weight *= 2
        assert torch.allclose(
            run(present, build_graph(neighbors=alone), hidden, features),
            run(by_two, build_graph(neighbors=alone), hidden, features),
            atol=1e-12,
        )
    learned.train()
    weighted_sum(run(learned, build_graph(), hidden, features)).backward()
    assert all(layer.mixing.grad.abs().min() > 0 for layer in learned.gcs)


@pytest.mark.parametrize("options", [{}, {"no_intra_edges": True}, {"graph_mean": "learned", "graph_recompute": True}])
def test_before_training_the_output_is_the_language_models_state(options):
    torch.manual_seed(0)
    network = GraphNetwork(GnnConfig(graph_attention_heads=HEADS, **options), DIM, feature_dim=12)
    hidden, features = rows(TOKENS, DIM, seed=1, dtype=torch.float32), rows(LENGTH, 12, seed=2, dtype=torch.float32)
    trained = [p for p in network.parameters() if p.requires_grad]
    target = rows(TOKENS, DIM, seed=3, dtype=torch.float32)
    losses = []
    for step in range(25):
        out = run(network, build_graph(), hidden, features)
        assert step or torch.equal(out, hidden)
        loss = (out - target).square().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for weight, gradient in zip(trained, gradients):
                weight -= 1e-2 * gradient.sign()
    assert losses[-1] < losses[0] / 2
    assert all(bool(gradient.any()) for gradient in gradients)


def test_the_references_start_is_nearly_uniform_attention():
    bounds = {}
    for start in ("zero", "reference"):
        layer = GraphNetwork(GnnConfig(graph_attention_heads=8, graph_start=start), 1024).gcs[0]
        bounds[start] = float(layer.relation_att.detach().abs().max())
    assert abs(bounds["reference"] - 0.00605) < 1e-4  # of GNN-LM, width 1024
    assert abs(bounds["zero"] - 0.153) < 1e-3


def test_weights_that_change_between_evaluations_are_read_anew():
    network, hidden, features = make_network().eval(), rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    other = make_network(seed=5).state_dict()
    with torch.no_grad():
        before = run(network, build_graph(), hidden, features)
        assert torch.equal(run(network, build_graph(), hidden, features), before)
        network.load_state_dict(other)
        loaded = run(network, build_graph(), hidden, features)
        for name, value in network.named_parameters():  # as if trained through tensors that count no versions
            value.data.copy_(make_network().state_dict()[name])
        back = run(network.train().eval(), build_graph(), hidden, features)
    assert torch.equal(loaded, run(make_network(seed=5), build_graph(), hidden, features))
    assert torch.equal(back, before)
    with torch.inference_mode():
        assert torch.equal(run(network, build_graph(), hidden, features), before)


def test_the_number_of_weights_is_the_published_one():
    network = GraphNetwork(GnnConfig(graph_start="reference"), 1024)
    assert sum(value.numel() for value in network.state_dict().values()) == 26_775_606


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_computing_twice_gives_the_same_gradients(dropout, monkeypatch):
    monkeypatch.setattr("fairseq.memory.gnn.graph.CHUNK", 64)
    neighbors = torch.randint(0, 700, (1, 30, 6), generator=torch.Generator().manual_seed(4))
    graph = GraphBuilder(GraphConfig(), 3, 700)(neighbors)
    assert len(graph.levels[0].chunks) > 3
    hidden, features = rows(30, DIM, seed=1), rows(700, DIM, seed=2).requires_grad_()
    gradients = []
    # With dropout, slices draw in the order of the slices: only another run by slices has the same draws.
    for recompute in (True, True) if dropout else (True, False):
        network = make_network(
            graph_recompute=recompute, graph_dropout=dropout, graph_attention_dropout=dropout
        ).train()
        torch.manual_seed(9)
        loss = weighted_sum(run(network, graph, hidden, features))
        inputs = [features, *(p for p in network.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(loss, inputs))
    for one, other in zip(*gradients):
        assert (one - other).abs().max() < 1e-12


def test_gradients_with_dropout_are_those_of_the_same_draws():
    network = make_network(graph_recompute=True, graph_dropout=0.3, graph_attention_dropout=0.3).train()
    graph = build_graph()
    hidden, features = rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2).requires_grad_()

    def loss(shifted):
        torch.manual_seed(11)
        return weighted_sum(run(network, graph, hidden, shifted))

    (gradient,) = torch.autograd.grad(loss(features), features)
    direction = rows(LENGTH, DIM, seed=5)
    with torch.no_grad():
        slope = (loss(features + 1e-5 * direction) - loss(features - 1e-5 * direction)) / 2e-5
    assert abs(float((gradient * direction).sum() - slope)) < 1e-7 * abs(float(slope)) + 1e-8
    with torch.no_grad():
        assert not torch.equal(loss(features), weighted_sum(run(network.eval(), graph, hidden, features)))


def test_the_largest_tensor_does_not_grow_with_the_window():
    tokens, k, dim = 64, 16, 64
    neighbors = torch.randint(0, 5000, (1, tokens, k), generator=torch.Generator().manual_seed(4))
    graph = GraphBuilder(GraphConfig(), 3, 5000)(neighbors)
    network = make_network(torch.float32, dim=dim)
    hidden, features = rows(tokens, dim, seed=1, dtype=torch.float32), rows(5000, dim, seed=2, dtype=torch.float32)
    feature = features[graph.position_P]
    with LargestTensor() as largest:
        weighted_sum(network(hidden[None], network.encode(graph, feature))).backward()
    assert largest.numel <= len(graph.position_P) * dim


def test_a_text_read_token_by_token_gives_the_same_states():
    network, features = make_network(), rows(LENGTH, DIM, seed=2)
    for options in ({}, {"intra_context": 3}):
        network = make_network(**options)
        hidden = rows(TOKENS, DIM, seed=1)
        with torch.no_grad():
            whole = run(network, build_graph(first=None), hidden, features)
            state, steps = IncrementalState(), []
            for start, stop in ((0, 2), (2, 3), (3, 4), (4, 6)):
                graph = build_graph(first=None, neighbors=NEIGHBORS[start:stop])
                steps.append(run(network, graph, hidden[start:stop], features, incremental_state=state))
        assert (torch.cat(steps) - whole).abs().max() < 1e-12


GOLDEN = Path(os.environ.get("FAIRSEQ_GOLDEN", "/nowhere")) / "gnn" / "hgt_cases.pt"


@pytest.mark.skipif(not GOLDEN.exists(), reason="FAIRSEQ_GOLDEN names no folder with GNN-LM's stored run")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("suffix", "dtype", "close"), [("", torch.float32, 1e-6), ("_f64", torch.float64, 1e-12)])
def test_the_published_programs_run(suffix, dtype, close, recompute):
    stored = torch.load(GOLDEN, weights_only=True)
    meta, cases = (
        stored["meta"],
        [name for name in stored if isinstance(stored[name], dict) and "edges" in stored[name]],
    )
    position = torch.arange(meta["start"], meta["start"] + meta["T"])[None]
    assert len(cases) >= 3
    for name in cases:
        case, builder = stored[name], name.partition("_")[0]
        options = {
            "graph_dropout": 0.0,
            "graph_attention_dropout": 0.0,
            "graph_start": "reference",
            "graph_recompute": recompute,
        }
        network = GraphNetwork(GnnConfig(graph_layer=meta["L"], graph_attention_heads=meta["H"], **options), meta["d"])
        network.load_state_dict(stored["state_dict"])
        network.to(dtype).train()
        sides = {"neighbor_context": (case["left"], case["right"]), "windows_cross_band": True}
        config = GraphConfig(band=meta["invalid"], graph_builder=builder, **sides)
        graph = GraphBuilder(config, meta["L"], meta["N"])(stored["neighbors"][None], position)
        token = stored["tgt"].to(dtype, copy=True).requires_grad_()
        out = run(network, graph, token, stored["pq"]["decoded"].to(dtype))
        weighted_sum(out).backward()
        assert (out - case["out_tgt" + suffix]).abs().max() < close, name
        assert (token.grad - case["grad_tgt_in" + suffix]).abs().max() < close, name
        ours = dict(network.named_parameters())
        for weight, gradient in case["grad_w" + suffix].items():
            own = ours[weight].grad
            own = torch.zeros_like(gradient) if own is None else own
            assert (own - gradient).abs().max() < close, (name, weight)

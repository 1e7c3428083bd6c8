"""Nothing that comes later in the text moves an output, not by a single bit; the reference's merged graph does leak."""

import pytest
import torch
from test_network import BAND, FIRST, LENGTH, SIDES, make_network, rows

from fairseq.memory.gnn.config import GraphConfig
from fairseq.memory.gnn.graph import GraphBuilder

TOKENS, K, DIM = 10, 4, 16


def drawn(seed, tokens=TOKENS):
    return torch.randint(-1, LENGTH, (1, tokens, K), generator=torch.Generator().manual_seed(seed))


def outputs(network, build, neighbors, hidden, features, position=None):
    graph = build(neighbors, position)
    with torch.no_grad():
        return network(hidden[None], network.encode(graph, features[graph.position_P]))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sides", SIDES)
def test_later_tokens_and_their_neighbours_move_no_earlier_output(sides, dtype):
    network = make_network(dtype)
    build = GraphBuilder(GraphConfig(neighbor_context=sides, band=0), 3, LENGTH)
    hidden, features, neighbors = (
        rows(TOKENS, DIM, seed=1, dtype=dtype),
        rows(LENGTH, DIM, seed=2, dtype=dtype),
        drawn(3),
    )
    before = outputs(network, build, neighbors, hidden, features)
    for seed, token in enumerate((1, 4, TOKENS - 1)):
        changed, states = neighbors.clone(), hidden.clone()
        changed[0, token:] = drawn(seed + 10)[0, token:]
        states[token:] += 1
        after = outputs(network, build, changed, states, features)
        assert torch.equal(after[:token], before[:token])
        assert not torch.equal(after[token:], before[token:])


@pytest.mark.parametrize("sides", SIDES)
def test_the_merged_graph_leaks_where_its_windows_are_shorter_than_the_layers_reach(sides):
    network, hidden, features = make_network(), rows(2, DIM, seed=1), rows(LENGTH, DIM, seed=2)
    moved = {}
    for builder in ("dedup", "occurrence"):
        build = GraphBuilder(GraphConfig(neighbor_context=sides, band=0, graph_builder=builder), 3, LENGTH)
        first = [30, -1, -1, -1, -1, -1]
        graphs = [torch.tensor([[first, later]]) for later in ([-1] * 6, [27, 28, 29, 31, 32, 33])]
        moved[builder] = torch.stack([outputs(network, build, graph, hidden, features)[0] for graph in graphs])
    assert torch.equal(*moved["occurrence"])
    assert torch.equal(*moved["dedup"]) == (min(sides) >= 2)


@pytest.mark.parametrize("sides", SIDES)
def test_train_positions_within_the_band_move_no_output(sides):
    network = make_network()
    build = GraphBuilder(GraphConfig(neighbor_context=sides, band=BAND), 3, LENGTH)
    position = torch.arange(FIRST, FIRST + TOKENS)[None]
    hidden, features, neighbors = rows(TOKENS, DIM, seed=1), rows(LENGTH, DIM, seed=2), drawn(3)
    before = outputs(network, build, neighbors, hidden, features, position)
    for token in (0, 3, BAND - 1):
        # A token reads what earlier ones of its block have read: of positions that are in the band of all of them.
        changed = features.clone()
        changed[FIRST + token - BAND + 1 : FIRST + BAND] += 1
        after = outputs(network, build, neighbors, hidden, changed, position)
        assert torch.equal(after[: token + 1], before[: token + 1])


CONTEXT = 6


def features_of(text):
    """The key of a position is made of the CONTEXT tokens before it."""
    table = rows(50, DIM, seed=7)
    return torch.stack([table[text[max(0, p - CONTEXT) : p]].cumsum(0).sum(0) for p in range(len(text))])


def moves_its_own_prediction(config, windows):
    """Whether a token of the train text moves the output that predicts it, for any token of a block."""
    network = make_network()
    build = GraphBuilder(config, 3, LENGTH)
    block = torch.arange(FIRST, FIRST + TOKENS)
    neighbors = torch.stack([torch.cat([block + w, block - w]) for w in windows], 1).view(1, len(windows), 2, TOKENS)
    neighbors = neighbors.permute(0, 3, 1, 2).flatten(2).clamp(-1, LENGTH - 1)
    text = torch.randint(0, 50, (LENGTH,), generator=torch.Generator().manual_seed(5))
    features = features_of(text)
    before = outputs(network, build, neighbors, features[block], features, block[None])
    moved = False
    for token in range(TOKENS):
        changed = text.clone()
        changed[FIRST + token] += 1 if text[FIRST + token] < 49 else -1
        others = features_of(changed)
        after = outputs(network, build, neighbors, others[block], others, block[None])
        moved = moved or not torch.equal(after[: token + 1], before[: token + 1])
    return moved


@pytest.mark.parametrize("cross", [False, True])
def test_no_token_is_read_by_what_predicts_it_with_the_safe_band(cross):
    config = GraphConfig(neighbor_context=(2, 2), windows_cross_band=cross)
    safe = config.safe_band(CONTEXT, TOKENS)
    assert safe == CONTEXT + TOKENS + 2 * cross
    for band in (safe, safe - 1):
        made = GraphConfig(neighbor_context=(2, 2), windows_cross_band=cross, band=band)
        assert moves_its_own_prediction(made, windows=range(band, band + 4)) == (band < safe)

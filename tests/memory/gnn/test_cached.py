import numpy as np
import pytest
import torch
from dying import Died
from test_network import DIM, HEADS, NEIGHBORS, TOKENS, make_network, rows

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.gnn import cached
from fairseq.memory.gnn.cached import CachedStates, StateSource, store_states, train_state_codecs
from fairseq.memory.gnn.config import GnnConfig, GraphConfig
from fairseq.memory.gnn.features import KeyFeatures
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.network import GraphNetwork
from fairseq.modules.multihead_attention import IncrementalState

LENGTH = 300


def source_of(network=None, sides=(2, 2), width=DIM, documents=None, length=LENGTH):
    network = network or make_network(torch.float32).eval()
    values = rows(length, width, seed=2, dtype=torch.float32).numpy()
    config = GraphConfig(neighbor_context=sides, stop_at_documents=documents is not None)
    build = GraphBuilder(config, network.num_layers, length, documents)
    return StateSource(network, KeyFeatures(ChunkedArray([values]), "made up"), build)


def direct(source, neighbors, hidden):
    graph = source.build(neighbors)
    with torch.no_grad():
        return source.network(hidden, source.network.encode(graph, source.features.take(graph.position_P)))


HIDDEN = rows(1, TOKENS, DIM, seed=1, dtype=torch.float32)
NEAR = torch.tensor([NEIGHBORS])


@pytest.mark.parametrize("sides", [(0, 0), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("split", [False, True])
def test_stored_states_give_the_same_output(sides, split, tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "POSITIONS_AT_ONCE", 128)
    documents = Documents(np.array([[0, 0, 0], [41, 1, 0], [200, 2, 0]])) if split else None
    source = source_of(sides=sides, documents=documents)
    stored = store_states(source, tmp_path / "states.npy", dtype="float32")
    with torch.no_grad():
        out = source.network(HIDDEN, stored.lookup(NEAR))
        none = source.network(HIDDEN, stored.lookup(torch.full_like(NEAR, -1)))
    assert (out - direct(source, NEAR, HIDDEN)).abs().max() < 2e-6
    assert (none - direct(source, torch.full_like(NEAR, -1), HIDDEN)).abs().max() < 2e-6


def test_half_precision_and_codes_are_near(tmp_path):
    source = source_of(length=400)
    wanted = direct(source, NEAR, HIDDEN)
    codecs = train_state_codecs(source, num_bytes=8, num_sampled=300)
    assert len(codecs) == 2
    with torch.no_grad():
        half = source.network(HIDDEN, store_states(source, tmp_path / "half.npy").lookup(NEAR))
        coded = source.network(HIDDEN, store_states(source, tmp_path / "codes.npy", codecs).lookup(NEAR))
    assert 0 < (half - wanted).abs().max() < 5e-3
    states = source.states(torch.arange(400))
    assert all(codec.relative_error(state) < 0.1 for codec, state in zip(codecs, states))
    assert (coded - wanted).square().mean() < 0.1 * wanted.square().mean()
    assert np.load(tmp_path / "codes.npy").shape == (400, 16)


def test_adapted_features_are_stored_too(tmp_path):
    torch.manual_seed(0)
    config = GnnConfig(graph_attention_heads=HEADS, decoder_gcn_dim=12, graph_layer=1, graph_start="reference")
    source = source_of(GraphNetwork(config, DIM, feature_dim=10).eval(), width=10)
    stored = store_states(source, tmp_path / "states.npy", dtype="float32")
    with torch.no_grad():
        out = source.network(HIDDEN, stored.lookup(NEAR))
    assert out.shape == HIDDEN.shape
    assert (out - direct(source, NEAR, HIDDEN)).abs().max() < 2e-6


def test_a_text_is_generated_token_by_token_from_stored_states(tmp_path):
    source = source_of()
    stored = store_states(source, tmp_path / "states.npy", dtype="float32")
    state, steps = IncrementalState(), []
    with torch.no_grad():
        for token in range(TOKENS):
            near = stored.lookup(NEAR[:, token : token + 1])
            steps.append(source.network(HIDDEN[:, token : token + 1], near, state))
    assert (torch.cat(steps, 1) - direct(source, NEAR, HIDDEN)).abs().max() < 2e-6


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "POSITIONS_AT_ONCE", 64)
    monkeypatch.setattr("fairseq.memory.gnn.row_file.SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    source = source_of()
    store_states(source, tmp_path / "whole.npy")
    for kill in range(5):
        path, calls = tmp_path / f"killed{kill}.npy", []

        def dying(self, position, kill=kill, calls=calls, original=StateSource.states):
            calls.append(position)
            if len(calls) > kill:
                raise Died
            return original(self, position)

        with monkeypatch.context() as patch:
            patch.setattr(StateSource, "states", dying)
            with pytest.raises(Died):
                store_states(source, path)
        store_states(source, path)
        assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_states_of_anything_else_are_rejected(tmp_path):
    source = source_of()
    store_states(source, tmp_path / "states.npy")
    other = source_of(make_network(torch.float32, seed=5).eval())
    with pytest.raises(ValueError, match="store the states of this network again"):
        CachedStates.open(tmp_path / "states.npy", other)
    with pytest.raises(ValueError, match=r"holds states of window \[2, 2\], this run has \[1, 2\]"):
        CachedStates.open(tmp_path / "states.npy", source_of(sides=(1, 3)))
    with pytest.raises(ValueError, match="is complete and its weights is"):
        store_states(other, tmp_path / "states.npy")
    with pytest.raises(ValueError, match="neighbour 300 is no position"):
        CachedStates.open(tmp_path / "states.npy", source).lookup(torch.tensor([[[300]]]))


def test_what_has_no_states_is_an_error(tmp_path):
    network = make_network(torch.float32).eval()
    features = source_of(network).features
    build = GraphBuilder(GraphConfig(), 3, LENGTH)
    with pytest.raises(ValueError, match="features of 300 positions and the train split has 299"):
        StateSource(network, features, GraphBuilder(GraphConfig(), 3, 299))
    with pytest.raises(ValueError, match="--graph-builder dedup"):
        StateSource(network, features, GraphBuilder(GraphConfig(graph_builder="dedup"), 3, LENGTH))
    with pytest.raises(ValueError, match="--graph-layer 1 reads the features themselves"):
        StateSource(make_network(torch.float32, layers=1), features, build)
    with pytest.raises(ValueError, match="features are of width 16, the network reads 12"):
        StateSource(GraphNetwork(GnnConfig(graph_attention_heads=2), DIM, 12), features, build)
    with pytest.raises(ValueError, match="in training mode"):
        store_states(StateSource(network.train(), features, build), tmp_path / "states.npy")

"""GNN-LM's model: neighbours that are searched as it reads, empty batches, and the original's checkpoints."""

import pytest
import torch
from small_models import PAD, SIZE, VOCAB

from fairseq.checkpoint_utils import load_checkpoint, load_model
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.gnn.config import GraphConfig
from fairseq.memory.gnn.features import KeyFeatures
from fairseq.memory.gnn.graph import GraphBuilder
from fairseq.memory.gnn.inputs import FoundNeighbors, SearchedNeighbors
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.types import Metric
from fairseq.models.architectures import build_model_config
from fairseq.models.graph_lm import GraphLanguageModel
from fairseq.modules.multihead_attention import IncrementalState

LENGTH, K, DIM = 60, 5, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    given = {"graph_attention_heads": 2, "graph_start": "reference", "share_decoder_input_output_embed": True}
    made = GraphLanguageModel.build(build_model_config("transformer_lm_gnn", SIZE | given), VOCAB, PAD)
    for value in made.gnn.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return made.eval()


@pytest.fixture
def features():
    draw = torch.Generator().manual_seed(1)
    return KeyFeatures(ChunkedArray([torch.randn(LENGTH, DIM, generator=draw).numpy()]), "features")


@torch.no_grad()
def test_generation_searches_as_it_reads(model, features):
    """Token by token, the states are those of the whole text with the neighbours that brute force finds."""
    build = GraphBuilder(GraphConfig(), 3, LENGTH)
    text_1T = torch.randint(4, VOCAB, (1, 7), generator=torch.Generator().manual_seed(2))
    hidden_1TD = model(text_1T, "lm_output", neighbors=FoundNeighbors(*none(build, text_1T))).key_BTD
    keys = torch.from_numpy(features.keys.chunks[0])
    nearest_TK = torch.cdist(hidden_1TD[0], keys).topk(K, largest=False).indices
    graph = build(nearest_TK[None])
    wanted = model(text_1T, neighbors=FoundNeighbors(graph, features.take(graph.position_P))).hidden_BTD
    with pytest.raises(ValueError, match="the index holds 50 positions, the train split has 60"):
        SearchedNeighbors(ExactIndex(keys[:50], Metric.L2), K, (build, features))
    fewer = GraphBuilder(GraphConfig(), 2, LENGTH)(nearest_TK[None])
    with pytest.raises(ValueError, match="made for 2 layers, the network has 3"):
        model(text_1T, neighbors=FoundNeighbors(fewer, features.take(fewer.position_P)))
    model.searched = SearchedNeighbors(ExactIndex(features.keys, Metric.L2), K, (build, features))
    torch.testing.assert_close(model(text_1T).hidden_BTD, wanted, atol=1e-5, rtol=0)
    state, steps = IncrementalState(), []
    for place in range(text_1T.shape[1]):
        steps.append(model(text_1T[:, place : place + 1], incremental_state=state).hidden_BTD)
    torch.testing.assert_close(torch.cat(steps, 1), wanted, atol=1e-5, rtol=0)


def none(build, text_BT):
    graph = build(torch.full((*text_BT.shape, 1), -1))
    return graph, torch.zeros(len(graph.position_P), DIM)


def test_a_batch_without_rows_has_a_gradient_and_others_need_neighbours(model):
    nothing = torch.empty(0, 1, dtype=torch.int64)
    out = model.train()(nothing).hidden_BTD
    out.sum().backward()
    assert out.shape == (0, 1, DIM)
    assert model.gnn.gcs[0].q_linears[0].weight.grad is not None
    with pytest.raises(ValueError, match="it was given no neighbours; give their stores"):
        model(torch.full((1, 2), 5))


def test_the_language_model_within_stays_in_evaluation_mode(model):
    model.train()
    assert not any(layer.training for layer in model.decoder.layers)
    assert model.gnn.training
    assert all(not value.requires_grad for value in model.decoder.parameters())


def test_a_checkpoint_of_the_original_loads(model, tmp_path):
    """Names as GNN_LM's state dict has them, below a prefix of its own, with a codec that is left out."""
    args = {"task": "language_modeling", "arch": "transformer_lm_x", "tokens_per_sample": 16, "gcn_k": 4}
    args |= {"neighbor_context": "(2, 1)", "share_decoder_input_output_embed": True, "max_target_positions": 16}
    args |= {name: value for name, value in SIZE.items() if name.startswith("decoder")}
    weights = {
        name.replace("gnn.gcs", "decoder.hgt_decoder.gcs"): value.clone() for name, value in model.state_dict().items()
    }
    weights["decoder.tgt_quantizer.centroids"] = torch.zeros(4, 4)
    torch.save({"args": args, "model": weights}, tmp_path / "original.pt")
    found = load_checkpoint(str(tmp_path / "original.pt"))
    assert found.config["task"]["name"] == "graph_language_modeling"
    assert found.config["task"]["neighbor_context"] == "(2, 1)"
    loaded = load_model(found, VOCAB, PAD)
    assert isinstance(loaded, GraphLanguageModel)
    assert loaded.gnn.num_layers == 3
    assert loaded.gnn.layers[0].num_heads == 2
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

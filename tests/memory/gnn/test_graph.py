import pytest
import torch
from plain_hgt import kept, window_of

from fairseq.config import FlagParser, build
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.gnn.config import GnnConfig, GraphConfig
from fairseq.memory.gnn.graph import ROWS, GraphBuilder

LENGTH = 40


def random_neighbors(tokens, k, seed, blocks=1):
    drawn = torch.randint(-1, LENGTH, (blocks, tokens, k), generator=torch.Generator().manual_seed(seed))
    drawn[0, 0, 0], drawn[-1, -1, -1] = 0, LENGTH - 1
    return drawn


def positions_read(graph, token, place):
    """Train positions that a neighbour's last state is made of."""
    row = int(graph.index[-1][0, token, place])
    rows = {row}
    for level in reversed(graph.levels):
        rows = {int(r) for node in rows for r, has in zip(level.source_N3[node], level.has_N3[node]) if has}
    return sorted(int(graph.position_P[r]) for r in rows)


def documents_of(starts):
    return Documents.of_positions(*labels(starts))


def labels(starts):
    position = torch.arange(LENGTH)
    document = torch.searchsorted(torch.tensor(starts), position, right=True) - 1
    return document.numpy(), (position - torch.tensor(starts)[document]).numpy()


@pytest.mark.parametrize("sides", [(0, 0), (1, 0), (0, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("starts", [None, [0, 7, 8, 30]])
def test_a_neighbour_reads_its_window_as_far_as_the_layers_reach(sides, starts):
    documents = documents_of(starts) if starts else None
    config = GraphConfig(neighbor_context=sides, stop_at_documents=bool(starts))
    neighbors = random_neighbors(5, 6, seed=1)
    graph = GraphBuilder(config, 3, LENGTH, documents)(neighbors)
    wanted = [min(side, 2) for side in sides]
    labelled = labels(starts)[0].tolist() if starts else None
    for token in range(5):
        for place in range(6):
            j = int(neighbors[0, token, place])
            assert bool(graph.keep_BTK[0, token, place]) == (j >= 0)
            if j >= 0:
                assert positions_read(graph, token, place) == window_of(j, *wanted, LENGTH, labelled)


def test_equal_windows_are_one_node_and_levels_are_of_whole_rows():
    neighbors = torch.tensor([[[5, 6, 20], [6, 5, -1]], [[20, 7, 6], [5, 5, 5]]])
    graph = GraphBuilder(GraphConfig(), 3, LENGTH)(neighbors)
    assert len(set(graph.index[-1][graph.keep_BTK].tolist())) == 4  # 5, 6, 7 and 20
    assert graph.position_P.unique().tolist() == [3, 4, 5, 6, 7, 8, 9, 18, 19, 20, 21, 22]
    assert all(size % ROWS == 0 for size in graph.sizes)


@pytest.mark.parametrize("starts", [None, [0, 12, 26]])
def test_the_band_and_the_own_document_drop_neighbours_in_training_only(starts):
    documents = documents_of(starts) if starts else None
    config = GraphConfig(band=6, exclude_own_document=bool(starts))
    builder = GraphBuilder(config, 3, LENGTH, documents)
    neighbors = random_neighbors(8, 12, seed=2)
    first = 10
    keep = builder.keep(neighbors, torch.arange(first, first + 8)[None])
    labelled = labels(starts)[0].tolist() if starts else None
    pairs = kept(neighbors[0].tolist(), LENGTH, 6, first, labelled)
    assert [(t, int(neighbors[0, t, k])) for _, t, k in keep.nonzero().tolist()] == pairs
    assert len(pairs) < int((neighbors >= 0).sum())
    assert torch.equal(builder.keep(neighbors), neighbors >= 0)


def test_neighbours_at_the_band_are_kept_and_their_windows_end_there():
    position = torch.tensor([[20]])
    neighbors = torch.tensor([[[15, 14, 25, 26, 16, 24]]])
    graph = GraphBuilder(GraphConfig(band=5), 3, LENGTH)(neighbors, position)
    assert graph.keep_BTK.tolist() == [[[True, True, True, True, False, False]]]
    read = [positions_read(graph, 0, place) for place in range(4)]
    assert read == [[13, 14, 15], [12, 13, 14, 15], [25, 26, 27], [25, 26, 27, 28]]
    graph = GraphBuilder(GraphConfig(band=5, windows_cross_band=True), 3, LENGTH)(neighbors, position)
    assert [positions_read(graph, 0, place) for place in range(2)] == [[13, 14, 15, 16, 17], [12, 13, 14, 15, 16]]


def test_padding_has_no_neighbours_and_none_at_all_is_a_graph():
    builder = GraphBuilder(GraphConfig(band=1), 3, LENGTH)
    neighbors = torch.tensor([[[3, 4], [5, 6]]])
    assert builder.keep(neighbors, torch.tensor([[20, -1]])).tolist() == [[[True, True], [False, False]]]
    graph = builder(torch.full((2, 3, 4), -1))
    assert graph.sizes == (ROWS, ROWS, ROWS)
    assert not graph.keep_BTK.any()


@pytest.mark.parametrize("wrong", [LENGTH, -2])
def test_a_neighbour_outside_of_the_train_split_is_an_error(wrong):
    with pytest.raises(ValueError, match=f"neighbour {wrong} is no position of the train split of 40 tokens"):
        GraphBuilder(GraphConfig(), 3, LENGTH)(torch.tensor([[[wrong, 1]]]))


@pytest.mark.parametrize("field", ["stop_at_documents", "exclude_own_document"])
def test_documents_are_needed_where_they_are_read(field):
    with pytest.raises(ValueError, match="needs the documents of the train split"):
        GraphBuilder(GraphConfig(**{field: True}), 3, LENGTH)


def test_slices_of_a_level_hold_their_sources(monkeypatch):
    monkeypatch.setattr("fairseq.memory.gnn.graph.CHUNK", 128)
    builder = GraphBuilder(GraphConfig(), 3, 3000)
    neighbors = torch.randint(0, 3000, (1, 40, 16), generator=torch.Generator().manual_seed(0))
    graph = builder(neighbors)
    for below, level in zip(graph.sizes, graph.levels):
        assert len(level.chunks) > 2
        assert [chunk[0] for chunk in level.chunks[1:]] == [chunk[1] for chunk in level.chunks[:-1]]
        for start, stop, low, high in level.chunks:
            source = level.source_N3[start:stop]
            assert 0 <= low <= int(source.min()) <= int(source.max()) < high <= below
            assert (stop - start) % ROWS == (high - low) % ROWS == 0


def test_flags_make_the_configs():
    parser = FlagParser("graph", "Options.")
    parser.add_config(GraphConfig)
    parser.add_config(GnnConfig)
    given = parser.parse("--neighbor-context (2,1) --invalid-neighbor-context 7 --no-intra-edges".split())
    assert build(GraphConfig, given).neighbor_context == (2, 1)
    assert build(GraphConfig, given).safe_band(context=5, block=4) == 9
    assert build(GraphConfig, given | {"windows_cross_band": True}).safe_band(context=5, block=4) == 11
    assert build(GnnConfig, given).no_intra_edges
    assert build(GraphConfig, parser.parse(["--neighbor-context", "3"])).neighbor_context == (3, 3)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (GraphConfig, {"neighbor_context": (1, 2, 3)}, "is not one number or two"),
        (GraphConfig, {"neighbor_context": (-1, 2)}, "--neighbor-context must be at least 0"),
        (GraphConfig, {"band": -1}, "--invalid-neighbor-context must be at least 0"),
        (GraphConfig, {"graph_builder": "x"}, "--graph-builder x is not one of occurrence, dedup"),
        (GnnConfig, {"graph_layer": 0}, "--graph-layer must be at least 1"),
        (GnnConfig, {"graph_dropout": 1.0}, "--graph-dropout 1.0 is not in"),
        (GnnConfig, {"graph_mean": "x"}, "--graph-mean x is not one of two, present, learned"),
    ],
)
def test_impossible_options_are_errors(config, given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="--graph-attention-heads 8 does not divide the width 12"):
        GnnConfig().width(12)

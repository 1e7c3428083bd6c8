"""Where the tokens of a split are in its store, and which positions of a row the graph's layers read."""

import numpy as np
import pytest
import torch

from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.tasks.graph_batches import TextRows, columns

TOKENS = np.random.default_rng(0).integers(4, 50, 40)


def store_of(folder, place_N, documents=None, values=None, **metadata):
    """A store whose row i is of the token at ``place_N[i]``."""
    values = TOKENS[place_N] if values is None else values
    runs = Documents.of_positions(np.zeros(len(place_N), np.int64), place_N) if documents is None else documents
    with DatastoreWriter(folder / "store", len(place_N), 2, "float32", metadata, documents=runs.runs_R3) as writer:
        writer.append(np.zeros((len(place_N), 2), np.float32), values)
        writer.finish()
    return Datastore.open(folder / "store")


def blocks(mode="none", sizes=(40,)):
    return TokenBlockDataset(TOKENS, np.array(sizes), 10, mode)


@pytest.mark.parametrize(
    ("places", "metadata"),
    [
        (np.arange(40), {}),
        (np.arange(8, 40), {"context_window": 8}),
        (np.arange(40), {"context_window": 8, "all_tokens": True}),
        (np.r_[0:10, 20:40], {"document_unit": "text"}),  # a block was left out
    ],
)
def test_rows_of_a_text(tmp_path, places, metadata):
    rows = TextRows(store_of(tmp_path, places, **metadata), blocks())
    found = rows.find(np.arange(-1, 45))
    wanted = {int(place): row for row, place in enumerate(places)}
    assert found.tolist() == [wanted.get(place, -1) for place in range(-1, 45)]


def test_rows_of_documents_between_separators(tmp_path):
    """Separators, sentences of one token, are in no block and have no row."""
    cut = blocks("complete_doc", (7, 6, 1, 9, 1, 1, 15))
    places = np.r_[0:13, 14:23, 25:40]
    starts = cut.document_starts()
    document = np.searchsorted(starts, places, side="right") - 1
    table = Documents.of_positions(document, places - starts[document])
    rows = TextRows(store_of(tmp_path, places, table, document_unit="document"), cut)
    assert rows.find(places).tolist() == list(range(37))
    assert rows.find(np.array([13, 23, 24])).tolist() == [-1] * 3


def test_a_store_that_does_not_tell_where_its_rows_are(tmp_path):
    store = store_of(tmp_path, np.r_[0:10, 20:40], document_unit="block")
    with pytest.raises(ValueError, match="has 30 rows of 40 tokens, cut into blocks, and does not say where"):
        TextRows(store, blocks("eos", (10, 10, 20)))


def test_a_store_of_another_text(tmp_path):
    values = TOKENS.copy()
    values[17] += 1
    with pytest.raises(ValueError, match="another token at place 17; save it again"):
        TextRows(store_of(tmp_path, np.arange(40), values=values), blocks())


def test_columns_are_the_scored_ones_and_some_before_them():
    scored = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    assert columns(scored, 0).tolist() == [[2, 3, 4], [0, 1, 6], [4, 5, 6]]
    assert columns(scored, 1).tolist() == [[1, 2, 3, 4], [0, 1, 6, 6], [3, 4, 5, 6]]
    assert columns(scored, 99).tolist() == [[0, 1, 2, 3, 4, 6], [0, 1, 6, 6, 6, 6], [0, 1, 2, 3, 4, 5]]

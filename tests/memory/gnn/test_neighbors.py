"""Neighbours of a whole split against a comparison of everything with everything."""

import json
import shutil

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn.neighbors import SplitNeighbors, count_missing, search_split
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.memory.gnn.row_file import RowWriter
from fairseq.memory.index.exact.index import ExactIndex
from fairseq_cli.memory import neighbors

ROWS, DIM, DOCUMENT = 400, 16, 50


def write_store(prefix, rows, seed, documents=None, *, moved=slice(0), **metadata):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((rows, DIM)).astype(np.float32).cumsum(0) * 0.2  # neighbours in the text are alike
    keys[moved] += 9
    with DatastoreWriter(prefix, rows, DIM, metadata={"key_tap": "x"} | metadata, documents=documents) as writer:
        writer.append(torch.from_numpy(keys), torch.from_numpy(rng.integers(4, 9, rows)))
        writer.finish()
    return keys


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    at_R = np.arange(0, ROWS, DOCUMENT)
    runs_R3 = np.stack([at_R, at_R // DOCUMENT, np.zeros_like(at_R)], 1)
    return folder, write_store(folder / "train", ROWS, 0, runs_R3), write_store(folder / "valid", 90, 1)


def config(folder, split="train", **given):
    given = {"dstore_filename": str(folder / "train"), "num_neighbors": 7, "bulk": 64} | given
    return NeighborsConfig(queries=str(folder / split), **given)


def expected(train, queries, k, may):
    """The k most similar by cosine of those that may be taken, by comparing all with all."""
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(np.float64), queries.astype(np.float64))
    ]
    similarity = np.where(may, unit[1] @ unit[0].T, -np.inf)
    order = np.argsort(-similarity, 1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(may, order, 1), order, -1)


@pytest.mark.parametrize("band", [0, 5, 60, ROWS])
@pytest.mark.parametrize("own_document", [True, False])
def test_neighbors_in_the_train_split_are_the_nearest_outside_of_the_band(stores, tmp_path, band, own_document):
    folder, keys, _ = stores
    settings = {"band": band, "exclude_own_document": not own_document, "out": str(tmp_path / "n")}
    file = search_split(config(folder, **settings))
    at = np.arange(ROWS)
    may = np.abs(at[:, None] - at) >= band
    if not own_document:
        may &= at[:, None] // DOCUMENT != at // DOCUMENT
    np.testing.assert_array_equal(file.rows.block(0, ROWS).numpy(), expected(keys, keys, 7, may))


def test_a_band_below_what_the_keys_have_read_is_warned_of(tmp_path, caplog):
    write_store(tmp_path / "train", 60, 0, longest_input=24)
    search_split(config(tmp_path, band=24, out=str(tmp_path / "wide")))
    assert not caplog.records
    search_split(config(tmp_path, band=23, out=str(tmp_path / "n")))
    assert "have read up to 24 tokens, so that neighbours at 23" in caplog.text
    assert "give at least 24 and the tokens of a block" in caplog.text


def test_near_ones_leave_their_places_empty_where_nothing_replaces_them(stores, tmp_path, monkeypatch):
    folder, keys, _ = stores
    file = search_split(config(folder, band=5, no_replacement=True, out=str(tmp_path / "n")))
    found = expected(keys, keys, 7, np.ones((ROWS, ROWS), bool))
    near = np.abs(found - np.arange(ROWS)[:, None]) < 5
    np.testing.assert_array_equal(file.rows.block(0, ROWS).numpy(), np.where(near, -1, found))
    assert near.any(1).all()
    assert not near[:, -1].all()
    monkeypatch.setattr("fairseq.memory.gnn.neighbors._SAMPLED", 1000)  # several parts
    assert count_missing(file) == ROWS


def test_what_is_within_the_band_moves_no_row_unless_places_stay_empty(tmp_path):
    """How many places stay empty depends on near keys, which have read later tokens."""
    found = {}
    for name, moved in (("as it is", slice(0)), ("moved", slice(99, 103))):
        (tmp_path / name).mkdir()
        write_store(tmp_path / name / "train", ROWS, 0, moved=moved)
        for no_replacement in (False, True):
            out = tmp_path / name / f"n{no_replacement}"
            search_split(config(tmp_path / name, band=5, no_replacement=no_replacement, out=str(out)))
            kept = SplitNeighbors.open(out, train=Datastore.open(tmp_path / name / "train"))
            assert kept.searched_band == (0 if no_replacement else 5)
            found[name, no_replacement] = kept.take(torch.tensor([98]), 7)
    for no_replacement in (False, True):
        one, two = found["as it is", no_replacement], found["moved", no_replacement]
        assert torch.equal(one, two) != no_replacement


def test_another_split_takes_all_and_shards_are_one_file(stores, tmp_path, capsys):
    folder, keys, queries = stores
    wanted = expected(keys, queries, 7, np.ones((90, ROWS), bool))
    words = [
        str(folder / "valid"),
        "--dstore-filename",
        str(folder / "train"),
        "--k",
        "7",
        "--out",
        str(tmp_path / "n"),
    ]
    of_others = tmp_path / "n.shard1of3.run.json"
    of_others.write_text('{"command": "train.py x"}')
    with pytest.raises(ValueError, match="n.shard1of3.run.json is there and no fairseq-neighbors wrote it; give"):
        neighbors.main([*words, "--num-shards", "3", "--shard-id", "1"])
    assert [path.name for path in tmp_path.iterdir()] == [of_others.name]
    of_others.unlink()
    for shard in (0, 1, 2, 1):  # its own manifest is replaced
        neighbors.main([*words, "--num-shards", "3", "--shard-id", str(shard)])
    assert "30 tokens with 7 neighbours each" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.shard0of3.run.json").read_text())["figures"]["num_with_fewer"] == 0
    whole = SplitNeighbors.open(tmp_path / "n", train=Datastore.open(folder / "train"), num_tokens=90)
    np.testing.assert_array_equal(whole.take(torch.arange(90), 7).numpy(), wanted)
    assert whole.take(torch.tensor([88, 3]), 2).tolist() == wanted[[88, 3], :2].tolist()
    with pytest.raises(ValueError, match="8 neighbours are asked for and .*n keeps 7 .* --k 8"):
        whole.require(8)


def test_shards_that_are_not_the_parts_of_one_split_are_errors(stores, tmp_path):
    folder, _, _ = stores
    train = Datastore.open(folder / "train")
    for shard in range(3):
        search_split(config(folder, "valid", out=str(tmp_path / "n"), num_shards=3, shard_id=shard))
    first = tmp_path / "n.shard0of3.json"
    record, rows = first.read_bytes(), (tmp_path / "n.shard0of3").read_bytes()
    for ending in ("", ".json"):
        shutil.copy(tmp_path / f"n.shard1of3{ending}", tmp_path / f"n.shard0of3{ending}")
    with pytest.raises(ValueError, match=r"n.shard0of3 holds neighbours of tokens \[30, 60\].*\[0, 30\] belong in its"):
        SplitNeighbors.open(tmp_path / "n", train=train)
    (tmp_path / "n.shard0of3").write_bytes(rows)
    first.rename(tmp_path / "n.shard0of3.run.json")
    with pytest.raises(ValueError, match=r"n.shard0of3 is not there \(no "):
        SplitNeighbors.open(tmp_path / "n", train=train)
    first.write_bytes(record)
    assert len(SplitNeighbors.open(tmp_path / "n", train=train, num_tokens=90)) == 90
    for ending in ("", ".json"):
        (tmp_path / f"n.shard1of3{ending}").unlink()
    search_split(config(folder, "valid", out=str(tmp_path / "n"), num_shards=3, shard_id=1, num_neighbors=5))
    with pytest.raises(
        ValueError, match="n.shard0of3 keeps 7 neighbours of each token and .*n.shard1of3 keeps 5; search"
    ):
        SplitNeighbors.open(tmp_path / "n", train=train)
    search_split(config(folder, "valid", out=str(tmp_path / "n"), num_shards=2))
    with pytest.raises(ValueError, match="n is there in 2 shards and in 3; remove those of one"):
        SplitNeighbors.open(tmp_path / "n", train=train)
    for path in tmp_path.glob("n.shard*of*[0-9].json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"n is not there \(no .*n.json"):
        SplitNeighbors.open(tmp_path / "n", train=train)


def test_more_neighbors_than_rows_leave_places_empty(tmp_path):
    write_store(tmp_path / "train", 5, 0)
    file = search_split(config(tmp_path, band=2, out=str(tmp_path / "n")))
    assert (file.rows.block(0, 5) >= 0).sum(1).tolist() == [3, 2, 2, 2, 3]


def test_a_killed_search_goes_on_with_the_same_bytes(stores, tmp_path, monkeypatch):
    folder, _, _ = stores
    search_split(config(folder, band=5, out=str(tmp_path / "whole")))
    search, calls = ExactIndex.search, []

    def dies(index, query_ND, k):
        calls.append(len(query_ND))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return search(index, query_ND, k)

    monkeypatch.setattr(RowWriter, "checkpoint_when_due", RowWriter.checkpoint)
    monkeypatch.setattr(ExactIndex, "search", dies)
    with pytest.raises(KeyboardInterrupt):
        search_split(config(folder, band=5, out=str(tmp_path / "cut")))
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="cut.progress.json is of .* rows .* width is 7, that of this command is 3"):
        search_split(config(folder, band=5, num_neighbors=3, out=str(tmp_path / "cut")))
    done = sum(calls[:3])
    search_split(config(folder, band=5, out=str(tmp_path / "cut")))
    assert sum(calls[4:]) == ROWS - done
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    monkeypatch.setattr(ExactIndex, "search", None)
    assert len(search_split(config(folder, band=5, out=str(tmp_path / "cut")))) == ROWS
    for k in (3, 9):
        with pytest.raises(ValueError, match=f"cut is complete with 7 neighbours of each token, this .* for {k}; give"):
            search_split(config(folder, band=5, num_neighbors=k, out=str(tmp_path / "cut")))
    with pytest.raises(ValueError, match="cut is complete and its band is 5, that of this command is 6"):
        search_split(config(folder, band=6, out=str(tmp_path / "cut")))


def test_headerless_files_of_the_original_are_read(stores, tmp_path):
    folder, _, _ = stores
    train = Datastore.open(folder / "train")
    rows = np.random.default_rng(0).integers(-1, ROWS, (90, 4))
    rows.astype(np.int64).tofile(tmp_path / "neighbors.mmap.4")
    opened = SplitNeighbors.open(tmp_path / "neighbors.mmap.4", train=train, num_tokens=90)
    assert (opened.k, opened.take(torch.tensor([7]), 4).tolist()) == (4, [rows[7].tolist()])
    (tmp_path / "neighbors.mmap.4").rename(tmp_path / "neighbors.mmap.7")
    with pytest.raises(ValueError, match="has 2880 bytes, which are no rows of 7 int64 neighbours"):
        SplitNeighbors.open(tmp_path / "neighbors.mmap.7", train=train)
    rows[3, 1] = ROWS
    rows.astype(np.int64).tofile(tmp_path / "neighbors.mmap.4")
    with pytest.raises(ValueError, match=f"names row {ROWS} of a train split of {ROWS} rows"):
        SplitNeighbors.open(tmp_path / "neighbors.mmap.4", train=train)


def test_other_files_are_refused_before_any_search(stores, tmp_path, monkeypatch):
    folder, _, _ = stores
    monkeypatch.setattr("fairseq.memory.gnn.neighbors.open_search", lambda *given, **more: pytest.fail("before it"))
    np.save(tmp_path / "keys.npy", np.ones(3))
    for shards in (1, 2):
        with pytest.raises(ValueError, match=f"--out {tmp_path} is a folder"):
            search_split(config(folder, out=str(tmp_path), num_shards=shards))
    with pytest.raises(ValueError, match="keys.npy is there and no keys.npy.json beside it"):
        search_split(config(folder, out=str(tmp_path / "keys.npy")))
    assert [path.name for path in tmp_path.iterdir()] == ["keys.npy"]


def test_mistakes_are_named_before_any_search(stores, tmp_path, monkeypatch):
    folder, _, _ = stores
    monkeypatch.setattr(ExactIndex, "search", None)
    write_store(tmp_path / "other", 60, 2, model_digest="b")
    write_store(tmp_path / "train", 60, 2, model_digest="a")
    with pytest.raises(ValueError, match="differ in model_digest: a and b; save both with one model"):
        search_split(config(tmp_path, "other"))
    with pytest.raises(ValueError, match="does not say of which document its rows are"):
        search_split(config(tmp_path, exclude_own_document=True))
    turned = Documents.of_positions(np.array([1] * 30 + [0] * 30), np.arange(60)).runs_R3
    write_store(tmp_path / "turned", 60, 3, turned)
    with pytest.raises(ValueError, match="is not in the order of its text: row 30 comes before rows of"):
        search_split(config(tmp_path, "turned"))
    with pytest.raises(ValueError, match="give --dstore-filename"):
        NeighborsConfig(queries="x")


def test_neighbors_in_another_store_are_rejected(stores, tmp_path):
    folder, _, _ = stores
    search_split(config(folder, "valid", out=str(tmp_path / "n")))
    write_store(tmp_path / "other", ROWS, 5)
    with pytest.raises(ValueError, match="holds neighbours in another datastore"):
        SplitNeighbors.open(tmp_path / "n", train=Datastore.open(tmp_path / "other"))
    with pytest.raises(ValueError, match="holds neighbours of 90 tokens, the split has 91"):
        SplitNeighbors.open(tmp_path / "n", train=Datastore.open(folder / "train"), num_tokens=91)

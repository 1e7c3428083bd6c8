"""Recall of neighbours against a count by hand over all pairs of tokens and neighbours."""

import json
import sys

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.gnn.neighbors import SplitNeighbors, search_split
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.memory.gnn.recall import measure
from fairseq.memory.gnn.recall.config import RecallConfig
from fairseq.memory.gnn.recall.measure import doubling, recall_of
from fairseq.memory.gnn.row_file import RowWriter
from fairseq_cli.memory import recall

TYPES, DIM = 6, 8
SIZES = {"train": 120, "valid": 40, "test": 30}
TOKENS = {split: np.random.default_rng(n).integers(4, 4 + TYPES, size) for n, (split, size) in enumerate(SIZES.items())}


def save(folder, split, noise, seed, tokens=None):
    """Keys near a point of their token: with little noise neighbours hold the token."""
    tokens = TOKENS[split] if tokens is None else tokens
    point = np.random.default_rng(99).standard_normal((TYPES + 4, DIM))
    keys = point[tokens] + noise * np.random.default_rng(seed).standard_normal((len(tokens), DIM))
    folder.mkdir(exist_ok=True)
    with DatastoreWriter(folder / split, len(tokens), DIM, metadata={"key_tap": folder.name}) as writer:
        writer.append(torch.from_numpy(keys.astype(np.float32)), torch.from_numpy(tokens))
        writer.finish()


@pytest.fixture
def folders(tmp_path):
    for name, noise in (("late", 0.3), ("early", 3.0)):
        for seed, split in enumerate(SIZES):
            save(tmp_path / name, split, noise, seed)
    return tmp_path


def by_hand(neighbor_TK, train, queries, k):
    """(share, count, any) of the first k neighbours, one by one."""
    hits, found, some = 0, 0, 0
    for token, row in zip(queries, neighbor_TK[:, :k]):
        there = [int(train[n]) == int(token) for n in row if n >= 0]
        hits, found, some = hits + sum(there), found + len(there), some + any(there)
    return hits / max(1, found), hits / len(queries), some / len(queries)


def run(tmp_path, *words):
    recall.main([*(str(tmp_path / name) for name in ("late", "early")), *map(str, words)])
    return json.loads((tmp_path / "late" / "recall.json").read_text())


def test_missing_neighbors_hold_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_NUMBERS", 20)
    save(tmp_path / "late", "train", 0.3, 0)
    save(tmp_path / "late", "valid", 0.3, 1)
    train, queries = (Datastore.open(tmp_path / "late" / name) for name in ("train", "valid"))
    kept = np.random.default_rng(5).integers(-1, len(train), (len(queries), 7))
    kept[3], kept[:, 0] = -1, np.where(np.arange(len(queries)) % 3, kept[:, 0], -1)
    with RowWriter(tmp_path / "n", *kept.shape, "int32", {"kind": "neighbors"}) as writer:
        writer.append(kept)
        writer.finish()
    found = recall_of(SplitNeighbors.open(tmp_path / "n", train=train), train, queries, (1, 2, 4, 7))
    for point in found:
        wanted = by_hand(kept, TOKENS["train"], TOKENS["valid"], point.k)
        assert (point.share, point.count, point.any) == pytest.approx(wanted)


def test_the_command_searches_compares_and_keeps(folders, capsys):
    figures = run(folders, "--splits", "valid", "test", "--k", 10)
    printed = capsys.readouterr().out
    assert [(c["folder"], c["split"]) for c in figures["curves"]] == [
        (str(folders / name), split) for split in ("valid", "test") for name in ("late", "early")
    ]
    for curve in figures["curves"]:
        kept = np.load(f"{curve['folder']}/{curve['split']}.neighbors")
        for point in curve["points"]:
            wanted = by_hand(kept, TOKENS["train"], TOKENS[curve["split"]], point["k"])
            assert (point["share"], point["count"], point["any"]) == pytest.approx(wanted)
    late, early = (curve["points"] for curve in figures["curves"][:2])
    assert [point["k"] for point in late] == [1, 2, 4, 8, 10]
    assert all(one["share"] > other["share"] for one, other in zip(late, early))
    assert "valid, 40 tokens: neighbours that hold the token, of all found\nk     late   early\n" in printed
    row = next(line for line in printed.splitlines() if line.startswith("10 "))
    assert row.split() == ["10", f"{late[-1]['share']:.4f}", f"{early[-1]['share']:.4f}"]
    assert json.loads((folders / "late" / "recall.run.json").read_text())["figures"]["curves"][0]["key_tap"] == "late"


def test_it_is_drawn_where_matplotlib_is_installed(folders):
    pytest.importorskip("matplotlib")
    run(folders, "--k", 4)
    assert (folders / "late" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(folders, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(folders, "--k", 4)
    assert "no plot: matplotlib is not installed" in caplog.text
    assert not (folders / "late" / "recall.png").exists()


@pytest.mark.parametrize("name", ["train.json", "valid.neighbors.json", "mine.png", "mine.run.json"])
def test_files_of_others_are_not_replaced(folders, monkeypatch, name):
    run(folders, "--k", 4)
    run(folders, "--k", 4)  # its own are
    monkeypatch.setattr(measure, "search_split", lambda *given: pytest.fail("before any search"))
    path = folders / "late" / name
    if not path.exists():
        path.write_text('{"command": "train.py"}')
    before, out = (
        path.read_bytes(),
        folders / "late" / name.removesuffix(".json").removesuffix(".run").removesuffix(".png"),
    )
    with pytest.raises(ValueError, match=f"{name} is there and no fairseq-neighbor-recall wrote it; give another"):
        run(folders, "--splits", "test", "--k", 4, "--out", out)
    assert path.read_bytes() == before


def test_outputs_of_the_first_release_are_replaced_once_and_like_ones_are_not(folders):
    """Their figures have no name of a format, and their plot says no more than who drew it."""
    run(folders, "--k", 4)
    path, plot = folders / "late" / "recall.json", folders / "late" / "recall.png"
    current = json.loads(path.read_text())
    early = {name: current[name] for name in ("measures", "curves")}
    for figures in ({**early, "more": 1}, {**early, "measures": {}}):
        path.write_text(json.dumps(figures))
        with pytest.raises(ValueError, match="recall.json is there and no .* wrote it; give another --out, or move it"):
            run(folders, "--k", 4)
    path.write_text(json.dumps(early))
    plot.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="recall.png is there"):
        run(folders, "--k", 4)
    plot.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x3atEXtSoftware\0Matplotlib version3.10.0")
    assert run(folders, "--k", 4) == current


def test_kept_neighbors_are_read_and_their_number_is_the_default(folders, monkeypatch):
    for name, k in (("late", 9), ("early", 5)):
        words = {"dstore_filename": str(folders / name / "train"), "num_neighbors": k, "num_shards": 2}
        for shard in range(2):
            search_split(NeighborsConfig(queries=str(folders / name / "valid"), shard_id=shard, **words))
    monkeypatch.setattr(measure, "search_split", lambda *given: pytest.fail("the neighbours are there"))
    figures = run(folders)
    assert [point["k"] for point in figures["curves"][0]["points"]] == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="8 neighbours are asked for and .* keeps 5 of each token"):
        run(folders, "--k", 8)


def test_kept_neighbors_of_another_metric_or_band_are_named(folders, monkeypatch, capsys):
    for split in ("valid", "train"):
        words = {"num_neighbors": 5, "faiss_metric_type": "l2", "band": 9}
        for name in ("late", "early"):
            stores = {"queries": str(folders / name / split), "dstore_filename": str(folders / name / "train")}
            search_split(NeighborsConfig(**stores, **words))
    monkeypatch.setattr(measure, "search_split", lambda *given: pytest.fail("the neighbours are there"))
    both = ("--splits", "valid", "train")
    with pytest.raises(ValueError, match="valid.neighbors keeps neighbours of metric l2, --faiss-metric-type cos asks"):
        run(folders, *both, "--faiss-metric-type", "cos")
    with pytest.raises(
        ValueError, match="train.neighbors keeps neighbours of band 9, --invalid-neighbor-context 1536 asks"
    ):
        run(folders, *both, "--invalid-neighbor-context", 1536)
    run(folders, *both)
    printed = capsys.readouterr().out
    assert "late, valid: neighbours by l2, index exact\n" in printed
    assert "early, train: neighbours by l2, index exact, none nearer than 9 tokens\n" in printed
    run(folders, "--invalid-neighbor-context", 1536)  # of another split there is no band


def test_the_train_split_finds_no_token_of_its_own_surroundings(folders):
    run(folders, "--splits", "train", "--k", 3, "--invalid-neighbor-context", 7)
    kept = np.load(folders / "late" / "train.neighbors")
    assert (np.abs(kept - np.arange(SIZES["train"])[:, None])[kept >= 0] >= 7).all()


def test_neighbors_that_were_searched_otherwise_are_warned_of(folders, caplog):
    words = {"dstore_filename": str(folders / "early" / "train"), "num_neighbors": 5, "faiss_metric_type": "l2"}
    search_split(NeighborsConfig(queries=str(folders / "early" / "valid"), **words))
    run(folders, "--k", 5)
    assert "late were searched with metric cos, those of" in caplog.text
    assert "early with l2: their recall differs by that too" in caplog.text


def test_stores_of_other_texts_and_neighbors_of_other_stores_are_rejected(folders):
    run(folders, "--k", 5)
    for file in (folders / "early").glob("valid*"):
        if not file.name.startswith("valid.neighbors"):
            file.unlink()
    save(folders / "early", "valid", 3.0, seed=77)
    with pytest.raises(ValueError, match="holds neighbours of another store .* than"):
        run(folders, "--k", 5)
    other = TOKENS["valid"].copy()
    other[7] = 4 + (other[7] - 3) % TYPES
    save(folders / "early", "again", 3.0, 1, other)
    save(folders / "late", "again", 3.0, 1, TOKENS["valid"])
    with pytest.raises(ValueError, match="40 rows, crc .* hold other tokens, and the recall of one text is compared"):
        run(folders, "--splits", "again", "--k", 5)
    assert not (folders / "late" / "again.neighbors").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folders": ()}, "name one folder of stores at least"),
        ({"folders": ("a", "b", "a/")}, "a is named twice"),
        ({"splits": ("valid", "valid")}, "--splits valid valid names none, or one twice"),
        ({"num_neighbors": 0}, "--k must be at least 1, got 0"),
        ({"band": -1}, "--invalid-neighbor-context must be at least 0"),
        ({"search_memory": 0.0}, "--search-memory must be at least 1e-06, got 0.0; it is in GB"),
    ],
)
def test_impossible_settings(given, message):
    with pytest.raises(ValueError, match=message):
        RecallConfig(**({"folders": ("a",)} | given))


def test_numbers_of_neighbors_double():
    assert doubling(1) == (1,)
    assert doubling(8) == (1, 2, 4, 8)
    assert doubling(11) == (1, 2, 4, 8, 11)

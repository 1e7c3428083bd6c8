"""What a build tells of its index, against figures counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.build import quality
from fairseq.memory.index.build.build import build_index, training_rows
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.quality import recall, report
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.types import Metric

ROWS, DIM = 2000, 8


@pytest.fixture
def store(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 50, (ROWS, DIM)).astype(np.float32)
    keys[1::2] += 100.0
    keys[7] = keys[5]  # an equal key is a neighbour, the row itself is not
    with DatastoreWriter(tmp_path / "dstore", ROWS, DIM, "float32", {}) as writer:
        writer.append(keys, np.arange(ROWS))
        writer.finish()
    return tmp_path / "dstore"


def config(prefix: Path, **more) -> BuildConfig:
    settings = {"ncentroids": 4, "code_size": 4, "report_queries": 60, "report_k": 10, "report_probes": (1, 4)}
    return BuildConfig(dstore_mmap=str(prefix), faiss_index=f"{prefix}.index", **(settings | more))


def test_recall_counts_true_neighbours_found_in_any_order():
    truth = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(torch.tensor([[4, 3, 2, 1], [5, -1, -1, 9]]), truth) == pytest.approx((1.0 + 0.25) / 2)


@pytest.mark.parametrize("dist", ["l2", "cos"])
def test_the_report_is_what_counting_by_hand_gives(store, dist):
    settings = config(store, train_size=700, dist=dist)
    built, opened = build_index(settings), Datastore.open(store)
    told = report(settings, opened, built)
    assert (told["k"], told["queries"], told["held_back"]) == (10, 60, True)
    assert [line["probe"] for line in told["probes"]] == [1, 4]
    assert told["bytes_per_key"] == pytest.approx(built.path.stat().st_size / ROWS)
    assert told["build_seconds"] > 0
    assert all(line["queries_per_second"] > 0 for line in told["probes"])
    seen = training_rows(settings, opened, 4)
    rows, _ = quality._query_rows(settings, opened, np.empty(0, np.int64), seen)
    assert not np.isin(rows, seen).any()
    keys = np.asarray(opened.keys).astype(np.float64)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True) if dist == "cos" else keys
    scores = -((keys[rows][:, None] - keys[None]) ** 2).sum(-1)
    scores[np.arange(len(rows)), rows] = -np.inf
    index = FaissIndex.open(built.path, Metric(dist))
    for line in told["probes"]:
        index.set_probe(line["probe"])
        found = index.search(torch.from_numpy(np.asarray(opened.keys)[rows]), 11).ids_NK.numpy()
        shares = []
        for row, ids, score in zip(rows, found, scores):
            best = np.sort(score)[-10]
            mine = [i for i in ids if i != row][:10]
            shares.append(sum(score[i] >= best for i in mine) / 10)
        assert line["recall"] == pytest.approx(np.mean(shares), abs=0.02)  # equal distances may count otherwise
    about = json.loads(Path(f"{built.path}.json").read_text())
    assert about["report"]["probes"] == told["probes"]


def test_a_flat_index_finds_all(store):
    settings = config(store, index="flat")
    told = report(settings, Datastore.open(store), build_index(settings))
    assert len(told["probes"]) == 1
    assert told["probes"][0]["recall"] > 0.99
    assert told["held_back"]  # it learned from none


def test_it_is_measured_once_and_anew_when_something_changed(store, monkeypatch):
    settings = config(store)
    built = build_index(settings)
    first = report(settings, Datastore.open(store), built)
    monkeypatch.setattr(quality, "measured", lambda *_: pytest.fail("measured again"))
    assert report(settings, Datastore.open(store), build_index(settings)) == first
    monkeypatch.undo()
    delete(store, np.arange(0, ROWS, 2))
    again = report(settings, Datastore.open(store), build_index(settings))
    assert again["asked"]["deleted"] == ROWS // 2
    assert again["probes"][-1]["recall"] > 0.2


def test_stores_of_a_few_rows_are_measured_too(tmp_path):
    for rows in (1, 2, 30):
        with DatastoreWriter(tmp_path / f"d{rows}", rows, DIM, "float32", {}) as writer:
            writer.append(np.eye(rows, DIM, dtype=np.float32), np.arange(rows))
            writer.finish()
        settings = config(tmp_path / f"d{rows}", index="flat")
        told = report(settings, Datastore.open(tmp_path / f"d{rows}"), build_index(settings))
        assert told["k"] == min(10, rows - 1)
        assert "probes" in told or rows == 1


def test_a_kill_during_the_report_loses_nothing(store, monkeypatch):
    settings = config(store)
    built = build_index(settings)
    before = built.path.read_bytes()
    monkeypatch.setattr(quality, "measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report(settings, Datastore.open(store), built)
    monkeypatch.undo()
    assert built.path.read_bytes() == before
    assert report(settings, Datastore.open(store), build_index(settings))["probes"]

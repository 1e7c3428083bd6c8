"""Distributions of neighbours as training targets, against sums in a dictionary."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.retrieval import soft_targets
from fairseq.memory.retrieval.soft_targets import OwnRows, SoftTargets, distributions, export

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")

N, K, V, T = 50, 6, 9, 3.0


def by_hand(values, scores, keep):
    """p of each token that some kept neighbour holds."""
    weights = [math.exp(score / T) if kept else 0.0 for score, kept in zip(scores, keep)]
    found = defaultdict(float)
    for value, weight in zip(values, weights):
        if weight:
            found[int(value)] += weight / sum(weights)
    return found


def drawn(seed=0, rows=N):
    rng = np.random.default_rng(seed)
    values, scores = rng.integers(0, V, (rows, K)), rng.normal(0, 5, (rows, K)).astype(np.float32)
    return values, scores, rng.random((rows, K)) < 0.8


def unpacked(count_N, token_M, prob_M):
    edges = np.concatenate([[0], np.cumsum(count_N)])
    return [dict(zip(token_M[a:b].tolist(), prob_M[a:b].tolist())) for a, b in zip(edges, edges[1:])]


def test_distributions_are_sums_per_token():
    values, scores, keep = drawn()
    keep[7] = False
    found = distributions(values, scores, keep, T)
    rows = unpacked(found.count_N, found.token_M, found.prob_M)
    assert rows[7] == {}
    for row, hand in zip(rows, map(by_hand, values, scores, keep)):
        assert row.keys() == {token for token, p in hand.items() if np.float16(p) > 0}
        assert all(row[token] == pytest.approx(hand[token], rel=1e-3, abs=1e-7) for token in row)
        assert list(row) == sorted(row)
    assert found.prob_M.dtype == np.float16


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_has_no_entries(shape):
    found = distributions(np.zeros(shape, int), np.zeros(shape), np.ones(shape, bool), 1.0)
    assert found.count_N.tolist() == [0] * shape[0]
    assert len(found.token_M) == 0


def test_a_text_knows_its_own_rows():
    text = np.arange(20) % 7
    same, later = ChunkedArray([text[:8], text[8:]]), ChunkedArray([text[5:]])
    ids = np.array([[3, 4, 5], [4, 0, 1]])
    keep = np.ones((2, 3), bool)
    assert OwnRows.of(text, same).drop(keep, ids, 4).tolist() == [[True, False, True], [True, True, True]]
    assert OwnRows.of(text, later).drop(keep, ids, 9).tolist() == [[True, False, True], [True, True, True]]
    other = text.copy()
    other[13] += 1
    for values in (other, np.append(other, 1), text[:0]):
        assert OwnRows.of(text, ChunkedArray([values])) == OwnRows(None)
    assert OwnRows(None).drop(keep, ids, 4) is keep


@pytest.mark.parametrize("num_compared", [6, 1 << 20])
def test_a_text_is_found_within_a_larger_store(num_compared, monkeypatch):
    """Such as a shard's text in the store of all, or the training text's in one that other texts were added to."""
    monkeypatch.setattr(soft_targets, "_COMPARED", num_compared)
    text = np.arange(20) % 7
    values = np.concatenate([text[:9] * 0, text[:15], [8], text, [1, 2]])  # its beginning stands there before it
    own = OwnRows.of(text, ChunkedArray([values[:30], values[30:]]))
    assert own == OwnRows(-25)
    assert own.drop(np.ones((1, 3), bool), np.array([[28, 29, 3]]), 4).tolist() == [[True, False, True]]
    assert OwnRows.of(text, ChunkedArray([values[:44]])) == OwnRows(None)  # its last token is missing
    assert OwnRows.of(values, ChunkedArray([text])) == OwnRows(None)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Neighbours that were saved block by block in another order than the text's, and the file of their targets."""
    monkeypatch.setattr(soft_targets, "_ROWS", 16)  # several record batches
    values, scores, keep = drawn(1)
    scores[~keep] = -np.inf
    text = np.random.default_rng(2).integers(0, V, N)
    ids = np.random.default_rng(3).integers(0, N, (N, K))
    ids[:, 0] = np.arange(N)  # a token's own row comes first
    block = np.repeat(np.arange(5), 10)
    order = np.concatenate([np.flatnonzero(block == number) for number in (3, 0, 4, 1, 2)])
    arrays = {"target": text, "block": block, "values": values, "scores": scores, "ids": ids}
    saved = {name: array[order] for name, array in arrays.items()}
    retrieval = SimpleNamespace(
        arrays=saved, order=np.argsort(saved["block"], kind="stable"), fingerprint={"text_digest": "t"}
    )
    path = str(tmp_path / "targets.arrow")
    figures = export(retrieval, ChunkedArray([text]), path, k=5, temperature=T)
    keep = (scores > -np.inf) & (ids != np.arange(N)[:, None])
    return path, figures, text, [by_hand(*row) for row in zip(values[:, :5], scores[:, :5], keep[:, :5])]


def test_the_file_is_in_the_order_of_the_text_and_of_the_known_form(exported):
    path, figures, text, wanted = exported
    with pyarrow.ipc.open_stream(path) as stream:
        table = stream.read_all()
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id_cnt", "int32"),
        ("token_id", "list<item: int32>"),
        ("prob", "list<item: halffloat>"),
        ("label", "int32"),
    ]
    assert table["label"].to_pylist() == text.tolist()
    for row, hand in zip(table.to_pylist(), wanted):
        assert row["id_cnt"] == len(row["token_id"]) == len(row["prob"])
        found = dict(zip(row["token_id"], row["prob"]))
        assert found == pytest.approx({t: p for t, p in hand.items() if np.float16(p) > 0}, rel=1e-3, abs=1e-7)
    assert figures["own_rows_dropped"]
    assert figures["num_entries"] == sum(table["id_cnt"].to_pylist())
    assert figures["bytes"] == Path(path).stat().st_size


def test_rows_are_read_across_record_batches(exported):
    path, _, text, wanted = exported
    targets = SoftTargets.open(path)
    assert len(targets) == N
    assert targets.labels.tolist() == text.tolist()
    assert targets.facts["temperature"] == T
    for numbers in ([3], [14, 15, 16, 17, 49], [40, 2, 3, 31, 32, 33, 0], list(range(N))):
        token_NM, prob_NM = targets.rows(np.array(numbers))
        assert token_NM.dtype == np.int64
        for row, number in enumerate(numbers):
            found = {int(t): float(p) for t, p in zip(token_NM[row], prob_NM[row]) if p > 0}
            hand = {t: p for t, p in wanted[number].items() if np.float16(p) > 0}
            assert found == pytest.approx(hand, rel=1e-3, abs=1e-7)
    assert targets.rows(np.empty(0, np.int64))[0].shape == (0, 0)
    with pytest.raises(IndexError, match="of 50"):
        targets.rows(np.array([49, 50]))


def test_files_of_another_kind_are_one_line(exported, tmp_path):
    path = Path(exported[0])
    with pytest.raises(ValueError, match="no file at"):
        SoftTargets.open(str(tmp_path / "none"))
    (tmp_path / "cut").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is no whole Arrow stream"):
        SoftTargets.open(str(tmp_path / "cut"))
    table = pyarrow.table({"id_cnt": pyarrow.array([1], pyarrow.int32()), "label": pyarrow.array([1], pyarrow.int32())})
    with pyarrow.OSFile(str(tmp_path / "other"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match="column 'token_id' is missing, not list<item: int32>"):
        SoftTargets.open(str(tmp_path / "other"))

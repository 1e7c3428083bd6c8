"""A store appended to a merged one."""

import numpy as np
import pytest
from dying import dies_at_event

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.merge import append, count_documents, join_parts, merge
from fairseq.memory.datastore.writer import DatastoreWriter


def write(prefix, rows, first, documents=2, dtype="float32"):
    """A store whose values count from ``first``, of documents of equal length."""
    starts = np.arange(documents) * (rows // documents)
    table = np.stack([starts, np.arange(documents), np.ones(documents, np.int64)], 1)
    with DatastoreWriter(prefix, rows, 4, dtype) as writer:
        keys = np.arange(first, first + rows, dtype=np.float32)[:, None].repeat(4, 1)
        writer.append(keys, np.arange(first, first + rows))
        writer.finish(documents=table)
    return str(prefix)


@pytest.fixture
def stores(tmp_path):
    a, b, c = (write(tmp_path / name, 6, first) for name, first in (("a", 0), ("b", 6), ("c", 12)))
    return str(tmp_path / "all"), a, b, c


def test_rows_and_documents_keep_their_numbers(stores):
    whole, a, b, c = stores
    merge(whole, [a, b])
    delete(whole, documents=[1])
    append(whole, c)
    opened = Datastore.open(whole)
    assert np.asarray(opened.values).tolist() == list(range(18))
    assert opened.deleted.tolist() == [3, 4, 5]
    assert opened.documents.runs_R3[:, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert count_documents(opened) == 6
    opened.verify()
    delete(whole, documents=[5])
    assert Datastore.open(whole).deleted.tolist() == [3, 4, 5, 15, 16, 17]


def test_merged_stores_do_not_share_document_numbers(stores):
    """Also where the metadata count no documents."""
    whole, a, b, _ = stores
    assert "num_documents" not in Datastore.open(a).metadata
    merge(whole, [a, b])
    assert Datastore.open(whole).documents.runs_R3[:, 1].tolist() == [0, 1, 2, 3]


def test_a_death_leaves_the_old_store_or_the_new_one(stores, monkeypatch):
    whole, a, b, c = stores
    merge(whole, [a, b])
    for event in range(10):
        try:
            with dies_at_event(monkeypatch, event):
                append(whole, c)
        except pytest.fail.Exception:
            break
        rows = len(Datastore.open(whole))
        assert rows in (12, 18)
        if rows == 18:
            merge(whole, [a, b])
    assert event >= 1
    assert len(Datastore.open(whole)) == 18


def test_parts_become_one_with_the_same_numbers(stores, tmp_path, monkeypatch):
    """Also where that dies; deleted rows stay deleted."""
    whole, a, b, c = stores
    merge(whole, [a, b, c])
    delete(whole, documents=[3])
    before = Datastore.open(whole)
    for event in range(30):
        try:
            with dies_at_event(monkeypatch, event):
                old = join_parts(whole, 1, tmp_path / f"joined-{event}")
        except pytest.fail.Exception:
            break
        assert len(Datastore.open(whole).shards) in (2, 3)
        if len(Datastore.open(whole).shards) == 2:
            merge(whole, [a, b, c])
            delete(whole, documents=[3])
    assert event > 4
    assert old == [b, c]
    joined = Datastore.open(whole)
    joined.verify()
    assert len(joined.shards) == 2
    for name in ("keys", "values", "deleted"):
        assert np.array_equal(np.asarray(getattr(joined, name)), np.asarray(getattr(before, name)))
    for row in range(18):
        assert [int(x[0]) for x in joined.where(np.array([row]))] == [int(x[0]) for x in before.where(np.array([row]))]
    append(whole, write(tmp_path / "d", 4, 18))
    assert Datastore.open(whole).documents.runs_R3[-1, 1] == 7


def test_what_does_not_fit_is_rejected(stores, tmp_path):
    whole, a, b, _ = stores
    with pytest.raises(ValueError, match="has arrays of its own; merge it under another name first"):
        append(a, b)
    merge(whole, [a])
    half = write(tmp_path / "half", 6, 0, dtype="float16")
    with pytest.raises(ValueError, match="key_dtype is 'float32' in the first and 'float16' in the second"):
        append(whole, half)
    assert len(Datastore.open(whole)) == 6

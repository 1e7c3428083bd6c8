"""Rows that are deleted, before the index was built or after, are found by no kind of index."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq.memory.index import INDEXES
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss import index as faiss_index
from fairseq.memory.index.faiss.builder import FaissBuilder
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss.strategy import SearchStrategy
from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops.merging import alive_of
from fairseq.memory.types import Metric

ROWS, DIM, DOCUMENT = 600, 8, 20  # 30 documents
KEYS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
SIZES = {"ncentroids": 6, "code_size": 4, "half_codes": 8, "dim": DIM}
# Named kinds, and those that cannot pass over rows by themselves: more neighbours are asked for.
KINDS = {name: factory.format(**SIZES) for name, factory in INDEXES.items()}
KINDS |= {each: each for each in ("HNSW8", "PQ4x4", "IVF6,Flat,RFlat", "PCA6,IVF6,SQ8", "PQ4x4fs", "SQ8", "exact")}


@functools.cache
def filled(kind: str, metric: Metric) -> FaissBuilder:
    builder = FaissBuilder.new(KINDS[kind], DIM, metric, seed=1)
    builder.train(KEYS)
    builder.add(KEYS)
    return builder


def index_of(kind: str, metric: Metric, deleted: np.ndarray) -> FaissIndex | ExactIndex:
    if kind == "exact":
        return ExactIndex(KEYS, metric, deleted=deleted)
    index = FaissIndex(filled(kind, metric)._finished(), metric, kind, deleted=deleted)
    index.set_probe(6)
    return index


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents=st.sets(st.integers(0, 29), max_size=29), k=st.sampled_from([1, 7, 20]), few=st.booleans())
def test_rows_of_a_deleted_document_never_appear_again(kind, metric, documents, k, few):
    deleted = np.sort(np.concatenate([np.arange(d * DOCUMENT, (d + 1) * DOCUMENT) for d in documents] or [[]])).astype(
        int
    )
    index = index_of(kind, metric, deleted)
    query = torch.from_numpy(KEYS[:3] if few else KEYS[::4])  # many take the way through matrix products
    found = index.search(query, k).ids_NK
    assert not np.isin(found.numpy(), deleted).any()
    if kind not in ("HNSW8", "IVF6,Flat,RFlat"):  # a graph, or a list that is looked at again, may come to an end
        assert (found >= 0).all()
    assert all(len(set(row) - {-1}) == len([i for i in row if i >= 0]) for row in found.tolist())
    if kind in ("flat", "exact"):
        alive = np.setdiff1d(np.arange(ROWS), deleted)
        truth = alive[ExactIndex(KEYS[alive], metric).search(query, k).ids_NK.numpy()]
        assert (found.numpy() == truth).mean() > 0.99


def test_k_above_the_rows_alive_is_told():
    deleted = np.arange(100, 590)
    for kind in ("ivfpq", "flat", "exact", "HNSW8"):
        index = index_of(kind, Metric.L2, deleted)
        index.search(torch.from_numpy(KEYS[:2]), 110)
        with pytest.raises(ValueError, match="--k 111 is larger than the datastore, which has 110 rows"):
            index.search(torch.from_numpy(KEYS[:2]), 111)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_the_way_by_matrix_products_finds_what_faiss_finds(metric, monkeypatch):
    deleted = np.arange(0, ROWS, 3)
    query = torch.from_numpy(KEYS)
    index = index_of("ivfpq", metric, deleted)
    assert index.bulk_pays(len(query))
    found = index.search(query, 9)
    monkeypatch.setattr(faiss_index, "choose_strategy", lambda *_: SearchStrategy.FAISS)
    truth = index.search(query, 9)
    torch.testing.assert_close(found.scores_NK, truth.scores_NK, rtol=1e-4, atol=1e-4)


def test_a_whole_list_may_be_deleted():
    lists = filled("ivfpq", Metric.L2).inner.invlists
    numbers = DecodedLists(filled("ivfpq", Metric.L2).inner, fast_int8=False).ids(0)
    assert len(numbers) == lists.list_size(0) > 0
    index = index_of("ivfpq", Metric.L2, np.sort(numbers))
    found = index.search(torch.from_numpy(KEYS), 3).ids_NK
    assert not np.isin(found.numpy(), numbers).any()


def test_more_are_asked_for_until_enough_are_alive():
    asked = []

    def search(k):
        asked.append(k)
        ids = torch.arange(k).expand(2, k).clone()
        return ids, -ids.float()

    ids, scores = alive_of(search, np.arange(500), 10, 600)
    assert ids.tolist() == [list(range(500, 510))] * 2
    assert scores[0, 0] == -500.0
    assert asked == [74, 296, 600]
    short = alive_of(
        lambda k: (torch.tensor([[3, 4, -1]]), torch.tensor([[1.0, 0.5, -torch.inf]])), np.array([3]), 2, 9
    )
    assert short[0].tolist() == [[4, -1]]

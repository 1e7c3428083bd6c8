"""Rows that are deleted, before the index was built or after, are found by no kind of index."""

import functools

import numba
import numpy as np
import pytest
import torch
from brute_force import similarities
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
from fairseq.memory.index.ops.products import by_name
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
    numbers = DecodedLists(filled("ivfpq", Metric.L2).inner, products=by_name("plain")).ids(0)
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


@pytest.mark.parametrize("kind", ["exact", "IVF4,PQ8"])
@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_deleted_rows_spoil_no_estimate_of_a_threshold(kind, metric, monkeypatch):
    """Bounds of deleted keys are minus infinity; with k 32 to 256 such a bound made every key of a list a candidate."""
    keys = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)
    deleted = np.arange(400)
    if kind == "exact":
        index = ExactIndex(keys, metric, deleted=deleted)
    else:
        builder = FaissBuilder.new(kind, 8, metric, seed=1)
        builder.train(keys)
        builder.add(keys)
        index = FaissIndex(builder._finished(), metric, deleted=deleted)
        index.set_probe(4)
        keys = index.inner.reconstruct_n(0, 4000)
    query = torch.from_numpy(np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32))
    truth = similarities(metric, query.numpy(), keys)
    truth[:, :400] = -np.inf
    for k in (16, 32, 40, 64, 128, 200, 256, 500):
        found = index.search(query, k)
        assert bool(((found.ids_NK >= 400) & (found.ids_NK < 4000)).all()), k
        best = np.sort(truth, axis=1)[:, ::-1][:, :k]
        np.testing.assert_allclose(np.take_along_axis(truth, found.ids_NK.numpy(), 1), best, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_the_kth_largest_is_estimated_from_finite_numbers(share):
    from fairseq.memory.index.ops.kernels import approx_kth_largest

    estimated = numba.njit(lambda scores, k: approx_kth_largest(scores, k))
    rng = np.random.default_rng(0)
    for count, k in ((10, 1), (1000, 5), (1000, 64), (5000, 300)):
        scores = rng.standard_normal(count).astype(np.float32)
        scores[rng.random(count) < share] = -np.inf
        finite = np.sort(scores[np.isfinite(scores)])[::-1]
        reach = estimated(scores, k)
        if len(finite) < k:
            assert reach == -np.inf
        else:
            assert (scores >= reach).sum() >= k
            assert reach >= finite[min(len(finite) - 1, k + k // 8 + 1)]

"""Neighbours that are handed over part by part are those of a whole search."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.types import Metric

ROWS, DIM = 3000, 16


def opened(metric, deleted=(), different=ROWS):
    keys = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)[np.arange(ROWS) % different]
    if metric is Metric.COS:
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    kind = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    inner = faiss.index_factory(DIM, "IVF20,PQ4np", kind)
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, metric, deleted=np.asarray(deleted, np.int64))
    index.set_probe(6)
    return index


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(("k", "different"), [(200, ROWS), (200, 300), (700, ROWS), (2900, ROWS)])
def test_each_query_has_the_neighbours_of_a_whole_search(metric, k, different, threads):
    index, seen = opened(metric, range(0, 60, 3), different), {}
    query_ND = torch.from_numpy(np.random.default_rng(1).standard_normal((400, DIM), dtype=np.float32))

    def take(numbers_Q, ids_QK, scores_QK):
        for number, ids_K, scores_K in zip(numbers_Q.tolist(), ids_QK, scores_QK):
            assert number not in seen
            seen[number] = sorted(zip((-scores_K).tolist(), ids_K.tolist()))

    assert index.search_in_parts(query_ND, k, take)
    whole = index.search(query_ND, k)
    assert sorted(seen) == list(range(len(query_ND)))
    for number, (ids_K, scores_K) in enumerate(zip(whole.ids_NK.tolist(), whole.scores_NK.neg().tolist())):
        assert seen[number] == sorted(zip(scores_K, ids_K))


def test_few_queries_are_not_searched_by_parts():
    query_ND = torch.zeros(3, DIM)
    assert not opened(Metric.L2).search_in_parts(query_ND, 60, lambda *_: pytest.fail("nothing is searched"))


def test_rows_that_an_index_cannot_have_are_reported():
    index = opened(Metric.L2)
    index.set_probe(20)
    lists = faiss.downcast_InvertedLists(index.inner.invlists)
    faiss.rev_swig_ptr(lists.get_ids(4), lists.list_size(4))[0] = ROWS + 7
    with pytest.raises(ValueError, match=f"list 4 holds row {ROWS + 7} of {ROWS}; the index is damaged: rebuild it"):
        index.search(torch.zeros(400, DIM), 200)


def test_an_error_of_the_taker_is_reported_and_the_next_search_is_right(threads):
    index = opened(Metric.L2)
    query_ND = torch.from_numpy(np.random.default_rng(1).standard_normal((1500, DIM), dtype=np.float32))
    expected, calls = index.search(query_ND, 200), []

    def fail(*_):
        calls.append(1)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        index.search_in_parts(query_ND, 200, fail)
    assert calls
    again = index.search(query_ND, 200)
    assert torch.equal(again.ids_NK, expected.ids_NK)
    assert torch.equal(again.scores_NK, expected.scores_NK)


def test_scores_beyond_the_range_of_float32_are_minus_infinity_either_way():
    index, seen = opened(Metric.L2), {}
    query_ND = torch.from_numpy(np.random.default_rng(1).standard_normal((400, DIM), dtype=np.float32)) * 5e18

    def take(numbers_Q, ids_QK, scores_QK):
        seen.update(
            (n, sorted(zip((-s).tolist(), i.tolist()))) for n, i, s in zip(numbers_Q.tolist(), ids_QK, scores_QK)
        )

    assert index.search_in_parts(query_ND, 700, take)
    whole = index.search(query_ND, 700)
    assert whole.scores_NK.isinf().any()
    for number, (ids_K, scores_K) in enumerate(zip(whole.ids_NK.tolist(), whole.scores_NK.neg().tolist())):
        assert seen[number] == sorted(zip(scores_K, ids_K))

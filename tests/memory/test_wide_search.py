"""Searches for more neighbours than a list holds find what faiss finds in the lists."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.decoded_lists import DecodedLists
from fairseq.memory.index.faiss_index import FaissIndex
from fairseq.memory.index.wide_search import is_wide, wide_search
from fairseq.memory.types import Metric


def made(rows, nlist, metric, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((rows, dim), dtype=np.float32)
    index = faiss.index_factory(
        dim, f"IVF{nlist},PQ4", faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    )
    index.train(keys)
    index.add(keys)
    index.nprobe = 6
    return index, torch.from_numpy(rng.standard_normal((150, dim), dtype=np.float32))


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("k", [40, 200, 700])
def test_finds_what_faiss_finds(metric, k):
    index, query_ND = made(3000, 40, metric)
    opened = FaissIndex(index, metric)
    assert is_wide(k, len(opened), index.nlist)
    assert DecodedLists.pays_for(index, len(query_ND))
    found = opened.search(query_ND, k)
    distances, ids = index.search(query_ND.numpy(), k)
    scores = -distances if metric is Metric.L2 else distances
    scores[ids < 0] = -np.inf
    np.testing.assert_allclose(found.scores_NK.numpy(), scores, atol=1e-4)
    same = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(found.ids_NK.tolist(), ids.tolist())]
    assert np.mean(same) > 0.999


def test_equal_keys_by_the_thousand_are_found_without_end():
    index, query_ND = made(3000, 40, Metric.L2)
    again = np.repeat(query_ND[:1].numpy(), 4000, 0)
    index.add(again)
    ids_NK, scores_NK = wide_search(DecodedLists(index, fast_int8=False), query_ND, 300)
    assert (ids_NK[0] >= 3000).all()
    assert (ids_NK >= -1).all()
    assert (scores_NK[:, :-1] >= scores_NK[:, 1:]).all()
    assert all(len(set(row)) == len(row) for row in ids_NK.tolist() if -1 not in row)


def test_lists_that_hold_less_than_k_leave_places_empty():
    index, query_ND = made(300, 40, Metric.L2)
    index.nprobe = 2
    ids_NK, scores_NK = wide_search(DecodedLists(index, fast_int8=False), query_ND, 100)
    theirs = index.search(query_ND.numpy(), 100)[1]
    assert ((ids_NK.numpy() < 0).sum(1) == (theirs < 0).sum(1)).all()
    assert torch.isneginf(scores_NK[ids_NK < 0]).all()


def test_a_part_of_the_queries_finds_the_same():
    index, query_ND = made(3000, 40, Metric.L2)
    lists = DecodedLists(index, fast_int8=False)
    whole, part = wide_search(lists, query_ND, 100), wide_search(lists, query_ND[30:37], 100)
    torch.testing.assert_close(whole[1][30:37], part[1])

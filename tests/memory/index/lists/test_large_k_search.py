"""Searches for more neighbours than a list holds find what faiss finds in the lists."""

from __future__ import annotations

import functools

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss.strategy import SearchStrategy, choose_strategy
from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.lists.large_k_search import large_k_search
from fairseq.memory.index.lists.search import Rotation
from fairseq.memory.index.ops import products
from fairseq.memory.index.ops.products import by_name
from fairseq.memory.types import Metric

PRODUCTS = pytest.mark.parametrize("name", ["avx2", "library_int8", "float32"])


@functools.cache
def trained(rows, nlist, metric, dim):
    keys = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    index = faiss.index_factory(
        dim, f"IVF{nlist},PQ4np", faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    )
    index.train(keys)  # "np": numbering alike codewords alike would take 15 seconds
    index.add(keys)
    return index


def made(rows, nlist, metric, dim=8):
    index = faiss.clone_index(trained(rows, nlist, metric, dim))
    index.nprobe = 6
    return index, torch.from_numpy(np.random.default_rng(1).standard_normal((150, dim), dtype=np.float32))


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("k", [40, 200, 700])
def test_finds_what_faiss_finds(metric, k, products):
    index, query_ND = made(3000, 40, metric)
    opened = FaissIndex(index, metric)
    assert choose_strategy(opened._traits(), len(query_ND), k) is SearchStrategy.LARGE_K_IN_BULK
    found = opened.search(query_ND, k)
    distances, ids = index.search(query_ND.numpy(), k)
    scores = -distances if metric is Metric.L2 else distances
    scores[ids < 0] = -np.inf
    np.testing.assert_allclose(found.scores_NK.numpy(), scores, atol=1e-4)
    same = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(found.ids_NK.tolist(), ids.tolist())]
    assert np.mean(same) > 0.999


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("factory", ["IVF40,Flat", "IVF40,SQ8"])
@pytest.mark.parametrize("k", [5, 40, 700])
def test_whole_keys_and_bytes_are_found_as_faiss_finds_them(factory, metric, k, monkeypatch):
    monkeypatch.setattr(products, "chosen", lambda: by_name(products.best_tiles()))
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((3000, 9), dtype=np.float32)  # of a width that no product of 8-bit integers takes
    index = faiss.index_factory(9, factory, faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    query_ND = torch.from_numpy(draw.standard_normal((300, 9), dtype=np.float32))
    dead = np.arange(0, 3000, 7)
    opened = FaissIndex(index, metric, deleted=dead)
    opened.set_probe(6)
    assert choose_strategy(opened._traits(), len(query_ND), k).decodes_lists
    found = opened.search(query_ND, k)
    alive = faiss.SearchParametersIVF(nprobe=6, sel=faiss.IDSelectorNot(faiss.IDSelectorBatch(dead)))
    distances, ids = index.search(query_ND.numpy(), k, params=alive)
    scores = -distances if metric is Metric.L2 else distances
    scores[ids < 0] = -np.inf
    np.testing.assert_allclose(found.scores_NK.numpy(), scores, atol=1e-4)
    same = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(found.ids_NK.tolist(), ids.tolist())]
    assert np.mean(same) > 0.999


def test_lists_that_are_not_kept_are_decoded_to_the_same_neighbours():
    index, query_ND = made(3000, 40, Metric.L2)
    kept, fresh = FaissIndex(index, Metric.L2), FaissIndex(index, Metric.L2)
    fresh.kept_bytes = 0
    for k in (5, 200):
        torch.testing.assert_close(kept.search(query_ND, k).scores_NK, fresh.search(query_ND, k).scores_NK)
    assert kept._decoded_lists()._cache
    assert fresh._decoded_lists()._cache is None


@PRODUCTS
def test_equal_keys_by_the_thousand_are_found_without_end(name):
    index, query_ND = made(3000, 40, Metric.L2)
    again = np.repeat(query_ND[:1].numpy(), 4000, 0)
    index.add(again)
    ids_NK, scores_NK = large_k_search(DecodedLists(index, products=by_name(name)), query_ND, 300)
    assert (ids_NK[0] >= 3000).all()
    assert (ids_NK >= -1).all()
    assert (scores_NK[:, :-1] >= scores_NK[:, 1:]).all()
    assert all(len(set(row)) == len(row) for row in ids_NK.tolist() if -1 not in row)


@PRODUCTS
def test_lists_that_hold_less_than_k_leave_places_empty(name):
    index, query_ND = made(300, 40, Metric.L2)
    index.nprobe = 2
    ids_NK, scores_NK = large_k_search(DecodedLists(index, products=by_name(name)), query_ND, 100)
    theirs = index.search(query_ND.numpy(), 100)[1]
    assert ((ids_NK.numpy() < 0).sum(1) == (theirs < 0).sum(1)).all()
    assert torch.isneginf(scores_NK[ids_NK < 0]).all()


@PRODUCTS
def test_a_part_of_the_queries_finds_the_same(name):
    index, query_ND = made(3000, 40, Metric.L2)
    lists = DecodedLists(index, products=by_name(name))
    whole, part = large_k_search(lists, query_ND, 100), large_k_search(lists, query_ND[30:37], 100)
    torch.testing.assert_close(whole[1][30:37], part[1])


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@PRODUCTS
@pytest.mark.parametrize("turned", [False, True])
def test_bounds_leave_nothing_out(metric, name, turned):
    index, query_ND = made(3000, 40, metric)
    lists = DecodedLists(index, products=by_name(name))
    if turned:  # the last columns are not multiplied but bounded
        lists._rotation = Rotation(torch.linalg.qr(torch.randn(8, 8))[0].contiguous(), 4)
    ids_NK, scores_NK = large_k_search(lists, query_ND, 200)
    distances, ids = index.search(query_ND.numpy(), 200)
    np.testing.assert_allclose(scores_NK.numpy(), -distances if metric is Metric.L2 else distances, atol=1e-4)
    assert np.mean([len(set(a) & set(b)) / 200 for a, b in zip(ids_NK.tolist(), ids.tolist())]) > 0.999


def decoded_scores(index, query_ND, probe_ids, deleted=()):
    """Brute force over the decoded keys of the visited lists, best first, of equals the lower row."""
    index.make_direct_map()
    keys = torch.from_numpy(index.reconstruct_n(0, index.ntotal)).double()
    lists = np.full(index.ntotal, -1)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            lists[faiss.rev_swig_ptr(index.invlists.get_ids(number), size)] = number
    scores = (
        -(torch.cdist(query_ND.double(), keys) ** 2)
        if index.metric_type == faiss.METRIC_L2
        else query_ND.double() @ keys.T
    )
    seen = torch.from_numpy((lists[None, :, None] == probe_ids[:, None, :]).any(2))
    seen[:, list(deleted)] = False
    return scores.masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("deleted", [(), (3, 17, 2999)])
def test_few_queries_find_what_brute_force_finds(metric, residual, count, deleted):
    index, query_ND = made(3000, 40, metric)
    if index.by_residual != residual:
        index.by_residual = residual
        index.use_precomputed_table = 0
        rng = np.random.default_rng(0)
        index.reset()
        index.add(rng.standard_normal((3000, 8), dtype=np.float32))
    query_ND, k = query_ND[:count], 300
    true_NR = decoded_scores(index, query_ND, index.quantizer.search(query_ND.numpy(), 6)[1], deleted)
    opened = FaissIndex(index, metric, deleted=np.array(deleted, np.int64))
    assert choose_strategy(opened._traits(), count, k) is SearchStrategy.LARGE_K_BY_TABLES
    for _ in range(2):  # lists are prepared by the first search
        found = opened.search(query_ND, k)
        best = true_NR.topk(k).values
        torch.testing.assert_close(found.scores_NK, best.float(), atol=1e-4, rtol=1e-5)
        own = true_NR.gather(1, found.ids_NK.clamp(min=0)).masked_fill(found.ids_NK < 0, -torch.inf)
        torch.testing.assert_close(own.float(), found.scores_NK, atol=1e-4, rtol=1e-5)
        assert not set(deleted) & set(found.ids_NK.flatten().tolist())
        equal = (found.scores_NK[:, 1:] == found.scores_NK[:, :-1]) & (found.ids_NK[:, 1:] >= 0)
        assert (found.ids_NK[:, 1:] > found.ids_NK[:, :-1])[equal].all()


def test_few_queries_and_short_lists():
    index, query_ND = made(300, 40, Metric.L2)
    opened = FaissIndex(index, Metric.L2)
    opened.set_probe(1)
    opened.search(query_ND[:3], 100)
    opened.set_probe(2)  # what was kept for another number of lists is too small now
    found = opened.search(query_ND[:3], 100)
    theirs = index.search(query_ND[:3].numpy(), 100)[1]
    assert ((found.ids_NK.numpy() < 0).sum(1) == (theirs < 0).sum(1)).all()
    assert torch.isneginf(found.scores_NK[found.ids_NK < 0]).all()


def test_keys_that_are_added_after_a_search_are_found():
    index, query_ND = made(3000, 40, Metric.L2)
    opened = FaissIndex(index, Metric.L2)
    opened.search(query_ND[:1], 100)
    index.add(np.repeat(query_ND[:1].numpy(), 2000, 0))
    assert (opened.search(query_ND[:1], 300).ids_NK[0, :100] >= 3000).all()

"""Searches of lists in bulk find what faiss finds, and what comparing every key finds."""

from __future__ import annotations

import functools
import itertools

import faiss
import numpy as np
import pytest
import torch
from brute_force import similarities
from conftest import set_fast_products

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss.strategy import SearchStrategy, choose_strategy
from fairseq.memory.index.lists import adc_search, bulk_search
from fairseq.memory.index.lists.bulk_search import search_in_bulk
from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops import products
from fairseq.memory.index.ops.products import by_name
from fairseq.memory.types import Metric, Neighbors

PRODUCTS = pytest.mark.parametrize("tiles", ["amx_int8", "avx512_vnni", "avx2", "asimddp"], indirect=True)


@pytest.fixture
def tiles(request, monkeypatch):
    """Tiles of each kind of processor; of missing instructions, what stands for them."""
    set_fast_products(monkeypatch, request.param)
    return by_name(request.param)


def as_neighbors(*given, **named):
    return Neighbors(*search_in_bulk(*given, **named))


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
    assert kept._decoded_lists().is_kept
    assert not fresh._decoded_lists().is_kept


@PRODUCTS
def test_equal_keys_by_the_thousand_are_found_without_end(tiles):
    index, query_ND = made(3000, 40, Metric.L2)
    again = np.repeat(query_ND[:1].numpy(), 4000, 0)
    index.add(again)
    ids_NK, scores_NK = search_in_bulk(DecodedLists(index, products=tiles), query_ND, 300)
    assert (ids_NK[0] >= 3000).all()
    assert (ids_NK >= -1).all()
    assert (scores_NK[:, :-1] >= scores_NK[:, 1:]).all()
    assert all(len(set(row)) == len(row) for row in ids_NK.tolist() if -1 not in row)


@PRODUCTS
def test_lists_that_hold_less_than_k_leave_places_empty(tiles):
    index, query_ND = made(300, 40, Metric.L2)
    index.nprobe = 2
    ids_NK, scores_NK = search_in_bulk(DecodedLists(index, products=tiles), query_ND, 100)
    theirs = index.search(query_ND.numpy(), 100)[1]
    assert ((ids_NK.numpy() < 0).sum(1) == (theirs < 0).sum(1)).all()
    assert torch.isneginf(scores_NK[ids_NK < 0]).all()


@PRODUCTS
def test_a_part_of_the_queries_finds_the_same(tiles):
    index, query_ND = made(3000, 40, Metric.L2)
    lists = DecodedLists(index, products=tiles)
    whole, part = search_in_bulk(lists, query_ND, 100), search_in_bulk(lists, query_ND[30:37], 100)
    assert torch.equal(whole[1][30:37], part[1])
    assert torch.equal(whole[0][30:37], part[0])


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("k", [1, 30, 200, 2000])
@pytest.mark.parametrize("expected", [48, 4])
@PRODUCTS
def test_every_key_that_is_near_is_found(metric, k, expected, tiles, monkeypatch):
    monkeypatch.setattr(bulk_search, "_EXPECTED", expected)  # with fewer a sample tells more often too much
    monkeypatch.setattr(bulk_search, "_SURELY", 1.0 if expected == 4 else 4.0)
    index, query_ND = made(3000, 40, metric)
    dead = np.arange(0, 3000, 5)
    true_NR = decoded_scores(index, query_ND, index.quantizer.search(query_ND.numpy(), 6)[1], dead)
    found = as_neighbors(DecodedLists(index, products=tiles, deleted=dead), query_ND, k)
    best = true_NR.topk(k).values
    torch.testing.assert_close(found.scores_NK, best.float(), atol=1e-4, rtol=1e-5)
    own = true_NR.gather(1, found.ids_NK.clamp(min=0)).masked_fill(found.ids_NK < 0, -torch.inf)
    torch.testing.assert_close(own.float(), found.scores_NK, atol=1e-4, rtol=1e-5)
    assert all(len(set(row)) == len(row) for row in found.ids_NK.tolist() if -1 not in row)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_bounds_hold_for_keys_far_from_zero_and_of_unequal_lengths(offset, metric, threads):
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((4000, 24), dtype=np.float32) * draw.lognormal(0.0, 1.5, (4000, 1)) + offset
    index = faiss.index_factory(24, "IVF20,Flat", faiss.METRIC_L2 if metric is Metric.L2 else 0)
    index.train(keys.astype(np.float32))
    index.add(keys.astype(np.float32))
    index.nprobe = 20  # all: the truth is that of every key
    query_ND = torch.from_numpy(keys[::40].astype(np.float32) + 0.1)
    found = as_neighbors(DecodedLists(index, products=by_name("plain")), query_ND, 50)
    truth = similarities(metric, query_ND.numpy(), keys.astype(np.float32))
    best = -np.sort(-truth, axis=1)[:, :50]
    np.testing.assert_allclose(found.scores_NK, best, rtol=2e-5, atol=1e-4)


def test_queries_of_which_a_sample_tells_too_much_are_searched_again(monkeypatch):
    index, query_ND = made(3000, 40, Metric.L2)
    lists = DecodedLists(index, products=by_name("plain"))
    expected = as_neighbors(lists, query_ND, 20)
    runs = []
    run = bulk_search._BulkSearch.run
    noting = lambda self, numbers, *given, **named: runs.append(len(numbers)) or run(self, numbers, *given, **named)  # noqa: E731
    monkeypatch.setattr(bulk_search._BulkSearch, "run", noting)
    monkeypatch.setattr(bulk_search, "_SURELY", -0.9)
    found = as_neighbors(lists, query_ND, 20)
    assert runs[0] == len(query_ND)
    assert 0 < runs[1] <= len(query_ND)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    assert torch.equal(found.scores_NK, expected.scores_NK)


@pytest.mark.parametrize("part", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_queries_whose_scores_are_below_what_was_expected_are_searched_again(part, metric, monkeypatch):
    index, query_ND = made(3000, 40, metric)
    lists = DecodedLists(index, products=by_name("plain"))
    monkeypatch.setattr(bulk_search, "_PART", 1.0)
    certain = as_neighbors(lists, query_ND, 20)
    runs = []
    run = bulk_search._BulkSearch.run
    noting = lambda self, numbers, *given, **named: runs.append(len(numbers)) or run(self, numbers, *given, **named)  # noqa: E731
    monkeypatch.setattr(bulk_search._BulkSearch, "run", noting)
    monkeypatch.setattr(bulk_search, "_PART", part)
    found = as_neighbors(lists, query_ND, 20)
    if part != 0.5:
        assert (len(runs) > 1) == (part == 0.02)  # which expects nearly all scores at their upper bounds
    assert torch.equal(found.ids_NK, certain.ids_NK)
    assert torch.equal(found.scores_NK, certain.scores_NK)


def test_memory_of_candidates_is_bounded(monkeypatch):
    index, query_ND = made(3000, 40, Metric.L2)
    lists = DecodedLists(index, products=by_name("plain"))
    whole = as_neighbors(lists, query_ND, 300)
    small = DecodedLists(index, products=by_name("plain"))
    monkeypatch.setattr(bulk_search, "_ROOM_BYTES", 1 << 20)
    parts = as_neighbors(small, query_ND, 300)
    assert torch.equal(whole.ids_NK, parts.ids_NK)
    assert sum(len(room) for room in small._rooms) <= 1 << 20


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


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("parts", [4, 8])
@pytest.mark.parametrize("name", ["plain", "avx512_vbmi"])
def test_sums_of_bytes_leave_nothing_out(metric, parts, name, monkeypatch):
    if name not in ("plain", adc_search.byte_sums()):
        pytest.skip("this processor does not look up bytes")
    index = faiss.index_factory(16, f"IVF20,PQ{parts}np", faiss.METRIC_L2 if metric is Metric.L2 else 0)
    keys = np.random.default_rng(0).standard_normal((4000, 16), dtype=np.float32)
    keys[:, :4] *= 30.0  # one part's entries reach far, and the bytes of the others are small
    index.train(keys)
    index.add(keys)
    query_ND = torch.from_numpy(keys[:9] + 0.3)
    found = []
    for way in ("", name):
        monkeypatch.setattr(adc_search, "byte_sums", lambda way=way: way)
        opened = FaissIndex(index, metric, deleted=np.arange(1, 4000, 9))
        opened.set_probe(7)
        found += [opened.search(query_ND, k) for k in (60, 400, 3000)]
        assert (opened._tables._codes is None) == (way == "")
    for by_floats, by_bytes in zip(found[:3], found[3:]):
        assert torch.equal(by_floats.ids_NK, by_bytes.ids_NK)
        assert torch.equal(by_floats.scores_NK, by_bytes.scores_NK)


def test_codes_are_copied_up_to_a_limit(monkeypatch):
    index, query_ND = made(3000, 40, Metric.L2)
    monkeypatch.setattr(adc_search, "byte_sums", lambda: "plain")
    few, many = adc_search.AdcSearch(index, kept_bytes=1000), adc_search.AdcSearch(index)
    assert few._codes is None
    for mine, other in zip(few.search(query_ND[:2], 200), many.search(query_ND[:2], 200)):
        assert torch.equal(mine, other)


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


def test_the_order_of_queries_does_not_matter():
    draw = np.random.default_rng(0)
    centre_CD = 20 * np.eye(16, dtype=np.float32)[:4]
    keys = centre_CD[draw.integers(0, 4, 2000)] + draw.standard_normal((2000, 16), dtype=np.float32)
    index = faiss.index_factory(16, "IVF4,PQ8np")
    index.train(keys)
    index.add(keys)
    index.nprobe = 4
    lists = DecodedLists(index, products=products.chosen_tiles())
    query_ND = torch.from_numpy(centre_CD + np.float32(0.5) * draw.standard_normal((4, 16), dtype=np.float32))
    whole = as_neighbors(lists, query_ND, 100)
    for order in itertools.permutations(range(4)):
        found = as_neighbors(lists, query_ND[list(order)], 100)
        assert torch.equal(found.ids_NK, whole.ids_NK[list(order)])
        assert torch.equal(found.scores_NK, whole.scores_NK[list(order)])


def test_parts_have_each_query_once_though_some_are_searched_again(monkeypatch):
    monkeypatch.setattr(bulk_search, "_SURELY", -2.0)  # too few keys reach what is expected
    index, query_ND = made(3000, 10, Metric.L2)
    lists, seen, rounds = DecodedLists(index, products=products.chosen_tiles()), [], []
    run = bulk_search._BulkSearch.run
    monkeypatch.setattr(
        bulk_search._BulkSearch, "run", lambda *given, **named: rounds.append(0) or run(*given, **named)
    )

    def take(numbers_Q, ids_QK, scores_QK):
        seen.extend(numbers_Q.tolist())
        assert (ids_QK >= 0).all()

    bulk_search.search_in_parts(lists, query_ND, 100, take)
    assert sorted(seen) == list(range(len(query_ND)))
    assert len(rounds) > 1

"""The choice between the ways of searching a faiss index, case by case."""

from __future__ import annotations

from dataclasses import replace

import faiss
import numpy as np
import pytest

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.faiss.strategy import IndexTraits, SearchStrategy, choose_strategy, faiss_strategy
from fairseq.memory.types import Metric

GPU, FAISS, ONE_THREAD = SearchStrategy.GPU, SearchStrategy.FAISS, SearchStrategy.FAISS_ON_ONE_THREAD
LARGE_IN_BULK, BY_TABLES = SearchStrategy.LARGE_K_IN_BULK, SearchStrategy.LARGE_K_BY_TABLES
IN_BULK = SearchStrategy.LISTS_IN_BULK

FLAT = IndexTraits(num_keys=40_000)
FOUR_BITS = IndexTraits(num_keys=40_000, num_lists=100, num_probed=8, has_lists=True)
SQ8 = replace(FOUR_BITS, bulk_queries_per_list=40)
PQ = replace(SQ8, bulk_queries_per_list=16, codes_in_ram=True)
MAPPED = replace(PQ, codes_in_ram=False)
ALL_PROBED = replace(PQ, num_probed=100)
# An average list of PQ has 400 keys, so k is large from 101 on; 200 queries that probe 8 of 100 lists are a bulk.
HUGE = replace(PQ, num_keys=1 << 32, num_lists=100, num_probed=8)


@pytest.mark.parametrize(
    ("traits", "num_queries", "k", "expected"),
    [
        (replace(PQ, on_gpu=True), 1000, 1000, GPU),
        (replace(FLAT, on_gpu=True), 1, 1, GPU),
        # Without lists there is nothing to decode.
        (FLAT, 1, 10, FAISS),
        (FLAT, 5000, 40_000, FAISS),
        # Codes of other kinds are faiss's own.
        (FOUR_BITS, 4, 10, ONE_THREAD),
        (FOUR_BITS, 5, 10, FAISS),
        (FOUR_BITS, 5000, 1000, FAISS),
        # A byte a column pays later, and has no tables.
        (SQ8, 1, 1000, ONE_THREAD),
        (SQ8, 499, 100, FAISS),
        (SQ8, 500, 100, IN_BULK),
        (SQ8, 499, 101, FAISS),
        (SQ8, 500, 101, LARGE_IN_BULK),
        # The edge of few queries.
        (PQ, 1, 100, ONE_THREAD),
        (PQ, 4, 100, ONE_THREAD),
        (PQ, 5, 100, FAISS),
        # The edge of a bulk.
        (PQ, 199, 100, FAISS),
        (PQ, 200, 100, IN_BULK),
        (ALL_PROBED, 15, 100, FAISS),
        (ALL_PROBED, 16, 100, IN_BULK),
        # The edge of a large k.
        (PQ, 1, 101, BY_TABLES),
        (PQ, 199, 101, BY_TABLES),
        (PQ, 200, 101, LARGE_IN_BULK),
        # Codes in a mapped file have no tables.
        (MAPPED, 1, 101, ONE_THREAD),
        (MAPPED, 199, 101, FAISS),
        (MAPPED, 200, 101, LARGE_IN_BULK),
        # Rows beyond 32 bits.
        (replace(HUGE, num_keys=(1 << 32) - 1), 1, 1 << 30, BY_TABLES),
        (HUGE, 1, 1 << 30, ONE_THREAD),
        (replace(HUGE, num_keys=(1 << 30) - 1), 200, 1 << 29, LARGE_IN_BULK),
        (replace(HUGE, num_keys=(1 << 32) - 1), 200, 1 << 30, BY_TABLES),
        (HUGE, 200, 1 << 30, FAISS),
    ],
)
def test_each_case_has_its_strategy(traits, num_queries, k, expected):
    assert choose_strategy(traits, num_queries, k) is expected


@pytest.mark.parametrize(("count", "expected"), [(0, ONE_THREAD), (4, ONE_THREAD), (5, FAISS)])
def test_queries_that_are_left_to_faiss_have_its_threads(count, expected):
    assert faiss_strategy(PQ, count) is expected
    assert faiss_strategy(FLAT, count) is FAISS


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", IndexTraits(600)),
        ("IVF6,SQ8", IndexTraits(600, 6, 2, has_lists=True, bulk_queries_per_list=40)),
        ("IVF6,Flat", IndexTraits(600, 6, 2, has_lists=True, bulk_queries_per_list=16)),
        ("IVF6,SQ4", IndexTraits(600, 6, 2, has_lists=True)),
        ("IVF6,PQ4np", IndexTraits(600, 6, 2, has_lists=True, bulk_queries_per_list=16, codes_in_ram=True)),
        ("IVF6,PQ4x4np", IndexTraits(600, 6, 2, has_lists=True)),
        ("PCA6,IVF6,SQ8", IndexTraits(600, 6, 2, has_lists=True)),
    ],
)
def test_traits_of_an_index(factory, expected, monkeypatch):
    monkeypatch.setattr("fairseq.memory.index.ops.products.has_fast_int8", lambda: True)
    inner = faiss.index_factory(8, factory)
    keys = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, Metric.L2)
    index.set_probe(2)
    assert index._traits() == expected


def test_bytes_and_whole_keys_are_decoded_only_where_their_products_are_fast(monkeypatch):
    keys = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    for factory, expected in (("IVF6,SQ8", 0), ("IVF6,Flat", 0), ("IVF6,PQ4np", 16)):
        inner = faiss.index_factory(8, factory)
        inner.train(keys)
        monkeypatch.setattr("fairseq.memory.index.ops.products.has_fast_int8", lambda: False)
        assert FaissIndex(inner, Metric.L2)._traits().bulk_queries_per_list == expected


def test_codes_in_a_mapped_file_are_not_in_ram(tmp_path):
    keys = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    inner = faiss.index_factory(8, "IVF6,PQ4np")
    inner.train(keys)
    inner.add(keys)
    faiss.write_index(inner, str(tmp_path / "x.l2"))
    index = FaissIndex.open(tmp_path / "x", Metric.L2, mapped=True)
    assert index._traits().bulk_queries_per_list
    assert not index._traits().codes_in_ram


def test_a_bulk_pays_where_it_is_decoded_on_a_gpu_too():
    inner = faiss.index_factory(8, "IVF6,PQ4np")
    keys = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, Metric.L2)
    index.set_probe(6)
    assert [index.bulk_pays(count) for count in (15, 16)] == [False, True]
    index._by_gpu = object()
    assert [index.bulk_pays(count) for count in (15, 16)] == [False, True]


@pytest.mark.parametrize(("kept_bytes", "expected"), [(2 << 30, 16), (0, 20)])
def test_keys_that_are_decoded_anew_wait_for_more_queries(kept_bytes, expected):
    keys = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    inner = faiss.index_factory(8, "IVF6,PQ4np")
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, Metric.L2)
    index.kept_bytes = kept_bytes
    assert index._traits().bulk_queries_per_list == expected

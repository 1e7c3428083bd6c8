"""Searches in bulk beside others, over keys that come later, and of queries and keys beyond the range of squares."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.lists import bulk_search
from fairseq.memory.types import Metric


def made(factory: str, metric: Metric = Metric.L2, rows: int = 4000) -> tuple[FaissIndex, torch.Tensor]:
    draw = np.random.default_rng(0)
    keys = draw.standard_normal((rows, 16), dtype=np.float32)
    inner = faiss.index_factory(16, factory, faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT)
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, metric)
    index.set_probe(4)
    return index, torch.from_numpy(draw.standard_normal((300, 16), dtype=np.float32))


def test_two_searches_at_the_same_time_find_what_one_finds():
    index, query_ND = made("IVF8,PQ4np")
    expected = index.search(query_ND, 20).ids_NK
    wrong: list[int] = []

    def search() -> None:
        for _ in range(6):
            wrong.append(int((index.search(query_ND, 20).ids_NK != expected).sum()))

    running = [threading.Thread(target=search) for _ in range(3)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    assert wrong == [0] * 18


@pytest.mark.parametrize("factory", ["IVF8,PQ4np", "IVF8,Flat"])
def test_queries_whose_squares_are_infinite_leave_the_others_alone(factory):
    index, query_ND = made(factory, Metric.IP)
    expected = index.search(query_ND, 20)
    mixed_ND = query_ND.clone()
    mixed_ND[::3] = 1e19
    found = index.search(mixed_ND, 20)
    others = torch.arange(300) % 3 != 0
    assert torch.equal(found.ids_NK[others], expected.ids_NK[others])


def test_keys_that_are_added_later_are_found_in_bulk():
    index, query_ND = made("IVF8,PQ4np")
    index.search(query_ND, 5)
    index.inner.add(query_ND.numpy())
    found = index.search(query_ND, 20).ids_NK
    assert (found >= 4000).any(1).float().mean() > 0.9


def test_a_key_that_is_no_number_hides_no_other():
    index, query_ND = made("IVF8,Flat")
    expected = index.search(query_ND, 5).ids_NK
    index.inner.add(np.full((1, 16), np.nan, np.float32))
    found = index.search(query_ND, 5).ids_NK
    assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize(("count", "size", "threads"), [(1, 1, 1), (255, 300, 2), (5000, 1250, 2), (30_000, 1900, 2)])
def test_groups_hold_every_query_once_and_become_smaller(count, size, threads):
    parts = bulk_search._shrinking(np.arange(count), size, threads)
    assert np.concatenate(parts).tolist() == list(range(count))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= size
    assert sum(sizes[-threads:]) <= max(threads * bulk_search._FEWEST, count // 8)

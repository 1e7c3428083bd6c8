"""Rows that are named are scored as a search scores them, whatever the kind of index."""

from __future__ import annotations

import functools

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.lists import pq_rescoring
from fairseq.memory.types import Metric

DIM, ROWS = 8, 1500
RNG = np.random.default_rng(0)
KEYS = RNG.standard_normal((ROWS, DIM)).astype(np.float32)
QUERIES = torch.from_numpy(RNG.standard_normal((7, DIM)).astype(np.float32))


@functools.cache
def trained(factory: str, metric: Metric) -> faiss.Index:
    keys = KEYS / np.linalg.norm(KEYS, axis=1, keepdims=True) if metric is Metric.COS else KEYS
    kind = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(DIM, factory, kind)
    index.train(keys)
    index.add(keys)
    return index


def built(factory: str, metric: Metric) -> FaissIndex:
    found = FaissIndex(faiss.clone_index(trained(factory, metric)), metric)
    found.set_probe(4)
    return found


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("factory", ["IVF4,PQ4np", "IVF4,PQ2x4", "Flat", "IVF4,Flat", "IVF4,SQ8", "OPQ4,IVF4,PQ4np"])
@pytest.mark.parametrize("few", [True, False])
def test_as_a_search_scores_them(factory: str, metric: Metric, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(pq_rescoring, "_MOST_BYTES", 0)
        monkeypatch.setattr(pq_rescoring, "_CHUNK_FLOATS", 100 * DIM)
    index = built(factory, metric)
    found = index.search(QUERIES, 50)
    shuffled_NM = found.ids_NK[:, torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    scores = {(n, int(i)): float(s) for n in range(7) for i, s in zip(found.ids_NK[n], found.scores_NK[n])}
    shuffled_NM[2, 3] = -1
    paired_NM = index.score_rows(QUERIES, shuffled_NM)
    assert paired_NM[2, 3] == -torch.inf
    for n in range(7):
        for m in range(50):
            if shuffled_NM[n, m] >= 0:
                assert float(paired_NM[n, m]) == pytest.approx(scores[n, int(shuffled_NM[n, m])], abs=2e-5)


def test_no_rows_have_no_scores() -> None:
    index = built("IVF4,PQ4np", Metric.L2)
    assert index.score_rows(QUERIES, torch.empty(7, 0, dtype=torch.int64)).shape == (7, 0)
    assert index.score_rows(QUERIES[:0], torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_an_index_that_gives_no_keys_back_says_so() -> None:
    index = faiss.IndexIDMap(faiss.IndexFlatL2(DIM))
    index.add_with_ids(KEYS, np.arange(ROWS))
    with pytest.raises(ValueError, match="does not give its keys back"):
        FaissIndex(index, Metric.L2).score_rows(QUERIES, torch.zeros(7, 1, dtype=torch.int64))

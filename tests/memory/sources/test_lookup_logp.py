"""Log-probabilities that neighbours give to targets, by look-ups that hold no neighbours."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.scoring import knn_logp
from fairseq.memory.sources import external
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Metric

ROWS, DIM = 2000, 8


def memory_of(kind, value_dtype):
    draw = np.random.default_rng(0)
    keys, values = draw.standard_normal((ROWS, DIM), dtype=np.float32), draw.integers(0, 9, ROWS).astype(value_dtype)
    store = Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})
    if kind == "exact":
        return ExternalMemory(store, ExactIndex(store.keys), 50)
    inner = faiss.index_factory(DIM, "IVF16,PQ4np")
    inner.train(keys)
    inner.add(keys)
    index = FaissIndex(inner, Metric.L2)
    index.set_probe(2)
    return ExternalMemory(store, index, 300, "index")  # more than two lists hold


@pytest.mark.parametrize("kind", ["exact", "lists"])
@pytest.mark.parametrize("value_dtype", [np.int64, np.int32, np.int16])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_it_is_the_formula_of_the_candidates(kind, value_dtype, count, monkeypatch):
    monkeypatch.setattr(external, "_QUERIES_AT_ONCE", 128)
    memory, draw = memory_of(kind, value_dtype), np.random.default_rng(1)
    query_ND = torch.from_numpy(draw.standard_normal((count, DIM), dtype=np.float32))
    query_ND[7:8] = torch.nan  # which has no neighbours
    target_N = torch.from_numpy(draw.integers(0, 9, count))
    found_N, logp_N = memory.lookup_logp(query_ND, target_N, 0.7)
    candidates = memory.lookup(query_ND)
    assert torch.equal(found_N, candidates.keep_NM.any(1))
    torch.testing.assert_close(logp_N, knn_logp(candidates, target_N, 0.7), rtol=1e-5, atol=1e-5)
    assert count < 300 or int(found_N.sum()) == count - 1

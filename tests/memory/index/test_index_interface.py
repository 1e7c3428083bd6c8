"""Every index keeps the interface of ``Index``: what a search scores, ``score_rows`` scores alike."""

import numpy as np
import pytest
import torch
from brute_force import similarities

from fairseq.memory.datastore import Datastore, DatastoreWriter
from fairseq.memory.index.base import Index
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.opening import open_index
from fairseq.memory.types import Metric

ROWS, DIM, K = 300, 8, 5
KEYS = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
QUERIES = torch.from_numpy(np.random.default_rng(1).standard_normal((40, DIM), dtype=np.float32))
DELETED = np.array([3, 4, 299])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("stores") / "store")
    with DatastoreWriter(prefix, num_rows=ROWS, dim=DIM) as writer:
        writer.append(KEYS, np.arange(ROWS))
        writer.finish()
    return prefix


@pytest.fixture(params=["exact", "flat", "IVF4,Flat", "IVF4,SQ8"])
def index(request: pytest.FixtureRequest, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Index:
    store = Datastore.open(prefix)
    if request.param == "exact":
        return ExactIndex(store.keys, Metric.L2, deleted=DELETED)
    name = str(tmp_path_factory.mktemp("indexes") / request.param)
    build_index(BuildConfig(dstore_mmap=prefix, faiss_index=name, index=request.param, use_faiss_cpu=True))
    opened = open_index(store, Metric.L2, name, probe=4)
    opened.deleted = DELETED  # type: ignore[misc]
    return opened


def test_rows_are_scored_as_a_search_scores_them(index: Index) -> None:
    found = index.search(QUERIES, K)
    scores_NK = index.score_rows(QUERIES, found.ids_NK)
    torch.testing.assert_close(scores_NK, found.scores_NK, rtol=1e-5, atol=1e-5)
    assert index.score_rows(QUERIES, torch.full((40, 2), -1)).eq(-torch.inf).all()


def test_deleted_rows_are_listed_and_never_found(index: Index) -> None:
    assert index.deleted.tolist() == DELETED.tolist()
    assert not np.isin(index.search(torch.from_numpy(KEYS[DELETED]), K).ids_NK.numpy(), DELETED).any()


def test_an_exact_search_streams_its_keys(index: Index) -> None:
    assert index.streams_keys == isinstance(index, ExactIndex)
    assert index.bulk_pays(1000) or not index.bulk_pays(1)
    if index.streams_keys:
        assert not index.bulk_pays(1)
        assert index.bulk_pays(2)


def test_without_a_name_the_keys_themselves_are_searched(prefix: str) -> None:
    opened = open_index(Datastore.open(prefix))
    truth = similarities(Metric.L2, QUERIES.numpy(), KEYS)
    best = np.argsort(-truth, axis=1, kind="stable")[:, :K]
    assert np.array_equal(opened.search(QUERIES, K).ids_NK.numpy(), best)

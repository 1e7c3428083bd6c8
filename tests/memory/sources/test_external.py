"""The external memory against brute force over all keys."""

import logging
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from brute_force import similarities

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.merge import merge
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.scoring import knn_logp
from fairseq.memory.sources.config import KnnConfig
from fairseq.memory.sources.external import ExternalMemory, open_external
from fairseq.memory.types import Metric, Neighbors

ROWS, DIM, VOCAB = 600, 8, 40
META = {"key_tap": "last_ffn_input", "dictionary_digest": "d" * 64, "dictionary_size": VOCAB}


def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, DIM), dtype=np.float32), rng.integers(0, VOCAB, ROWS)


@pytest.fixture
def prefix(tmp_path) -> Path:
    with DatastoreWriter(tmp_path / "dstore", ROWS, DIM, "float32", META) as writer:
        writer.append(*rows())
        writer.finish()
    return tmp_path / "dstore"


def made_store(keys: np.ndarray, values: np.ndarray) -> Datastore:
    return Datastore("store", ChunkedArray.of(keys), ChunkedArray.of(values), {})


def flat_index(prefix: Path) -> None:
    build_index(BuildConfig(dstore_mmap=str(prefix), faiss_index=f"{prefix}.index", index="flat"))


def config(prefix: Path, **more) -> KnnConfig:
    settings = {"dstore_filename": str(prefix), "indexfile": f"{prefix}.index", "num_neighbors": 10}
    return KnnConfig(**(settings | more))


QUERIES = torch.from_numpy(np.random.default_rng(1).standard_normal((30, DIM), dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", [1, 7, ROWS])
@pytest.mark.parametrize("score", ["recompute", "index", "dot"])
@pytest.mark.parametrize("metric", list(Metric))
def test_candidates_are_the_nearest_rows(metric, score, k, dtype, monkeypatch):
    monkeypatch.setattr("fairseq.memory.index.exact.row_scores._CHUNK_BYTES", 4 * DIM * k * 9)  # several uneven chunks
    keys = rows()[0].astype(dtype)
    store = made_store(keys, np.arange(ROWS))  # each row's value is its number
    found = ExternalMemory(store, ExactIndex(keys, metric), k, score).lookup(QUERIES)
    similarity = similarities(metric, QUERIES.numpy(), keys)
    shown = similarities(Metric.IP, QUERIES.numpy(), keys) if score == "dot" else similarity
    best = np.sort(similarity, axis=1)[:, ::-1][:, :k]
    ids = found.values_NM.numpy()
    np.testing.assert_allclose(np.take_along_axis(similarity, ids, 1), best, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.scores_NM, np.take_along_axis(shown, ids, 1), rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert found.keep_NM.all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_store_in_parts_is_one_store(tmp_path, indexed, dtype):
    keys, values = rows()
    for name, part in (("a", slice(0, 250)), ("b", slice(250, ROWS))):
        with DatastoreWriter(tmp_path / name, len(keys[part]), DIM, dtype, META) as writer:
            writer.append(keys[part], values[part])
            writer.finish()
    merge(tmp_path / "dstore", [tmp_path / "a", tmp_path / "b"])
    if indexed:
        flat_index(tmp_path / "dstore")
    settings = config(tmp_path / "dstore", **({} if indexed else {"indexfile": None}))
    memory = open_external(settings, dim=DIM, key_tap="last_ffn_input", dictionary_size=VOCAB)
    found = memory.lookup(QUERIES)
    rounded = torch.from_numpy(keys).to(getattr(torch, dtype)).float().numpy()
    truth_N = similarities(Metric.L2, QUERIES.numpy(), rounded)
    best_NK = np.argsort(-truth_N, axis=1)[:, :10]
    np.testing.assert_allclose(found.scores_NM, np.take_along_axis(truth_N, best_NK, 1), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found.values_NM, values[best_NK])


class GappyIndex:
    """Answers every query with row 5 and nothing else."""

    metric, dim, streams_keys = Metric.L2, DIM, False

    def __len__(self) -> int:
        return ROWS

    def search(self, query_ND, k):
        ids = torch.full((len(query_ND), k), -1)
        ids[:, 0] = 5
        scores = torch.full((len(query_ND), k), -torch.inf)
        scores[:, 0] = -1.0
        if len(query_ND) > 3:
            ids[3], scores[3] = -1, -torch.inf
        return Neighbors(ids, scores)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("score", ["recompute", "index", "dot"])
def test_missing_neighbours_are_masked_everywhere(score, dtype):
    """The originals read id -1 as the last row of the store."""
    keys, values = rows()
    store = made_store(keys.astype(dtype), values)
    found = ExternalMemory(store, GappyIndex(), 4, score).lookup(QUERIES)
    assert not found.keep_NM[:, 1:].any()
    assert torch.isneginf(found.scores_NM[:, 1:]).all()
    assert (found.values_NM[:, 1:] == -1).all()
    last = torch.full((len(QUERIES),), int(values[-1]))
    expected = 0.0 if values[5] == values[-1] else -torch.inf
    logp = knn_logp(found, last, 1.0)
    assert (logp[:3] == expected).all()
    assert logp[3] == -torch.inf


def test_dot_puts_the_most_similar_first():
    keys, values = rows()
    store = made_store(keys, values)
    found = ExternalMemory(store, ExactIndex(keys, Metric.IP), ROWS, "dot").lookup(QUERIES)
    assert (found.scores_NM.diff(dim=1) <= 1e-5).all()
    assert (found.scores_NM[:, 0] > 0).all()


def test_half_precision_queries():
    keys, values = rows()
    memory = ExternalMemory(made_store(keys, values), ExactIndex(keys), 3)
    found = memory.lookup(QUERIES.half())
    assert torch.equal(found.values_NM, memory.lookup(QUERIES.half().float()).values_NM)


def test_what_open_external_opens(prefix, caplog):
    flat_index(prefix)
    with caplog.at_level(logging.INFO):
        memory = open_external(
            config(prefix, move_dstore_to_mem=True),
            dim=DIM,
            key_tap="last_ffn_input",
            dictionary_digest="d" * 64,
            dictionary_size=VOCAB,
        )
    assert type(memory.store.keys.single_array) is np.ndarray
    assert "600 rows of width 8" in caplog.text
    keys, values = rows()
    assert memory.lookup(torch.from_numpy(keys[:5])).values_NM[:, 0].tolist() == values[:5].tolist()


def test_headerless_files_with_a_stated_size(prefix):
    flat_index(prefix)
    Path(f"{prefix}.json").unlink()
    memory = open_external(config(prefix, dstore_size=ROWS), dim=DIM, dictionary_size=VOCAB)
    assert len(memory.store) == ROWS
    with pytest.raises(ValueError, match="has no metadata"):
        open_external(config(prefix), dim=DIM)
    with pytest.raises(ValueError, match="it holds 600 rows"):
        open_external(config(prefix, dstore_size=ROWS - 1), dim=DIM)


@pytest.mark.parametrize("more", [{"no_load_keys": True}, {"knn_sim_func": "do_not_recomp_l2"}])
def test_scores_of_the_index_do_without_the_keys(prefix, more):
    flat_index(prefix)
    full = open_external(config(prefix), dim=DIM).lookup(QUERIES)
    Path(f"{prefix}_keys.npy").unlink()
    with pytest.raises(ValueError, match="_keys.npy does not exist"):
        open_external(config(prefix), dim=DIM)
    settings = config(prefix, **more, move_dstore_to_mem=True)
    found = open_external(settings, dim=DIM).lookup(QUERIES)
    torch.testing.assert_close(found.scores_NM, full.scores_NM, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="take the scores of an index: give --indexfile NAME"):
        open_external(config(prefix, **more, indexfile=None), dim=DIM)
    Path(f"{prefix}.json").unlink()
    stated = config(prefix, **more, dstore_size=ROWS)
    assert torch.equal(open_external(stated, dim=DIM).lookup(QUERIES).values_NM, found.values_NM)
    with pytest.raises(ValueError, match="opened without its keys, 'dot' scores need them"):
        ExternalMemory(Datastore.open(prefix, StoreHints(dim=DIM, size=ROWS), with_keys=False), GappyIndex(), 1, "dot")


def test_everything_is_checked_when_it_is_opened(prefix):
    with pytest.raises(ValueError, match="no index at"):
        open_external(config(prefix), dim=DIM)
    flat_index(prefix)
    cases = [
        (config(prefix, num_neighbors=ROWS + 1), {}, "--k 601 is larger than the datastore, which has 600 rows"),
        (config(prefix), {"dim": 16}, "keys of width 8; the model makes 16"),
        (config(prefix, dstore_size=99), {}, "has 600 rows; --dstore-size says 99"),
        (config(prefix), {"key_tap": "model_output"}, "--knn-keytype says model_output"),
        (config(prefix), {"dictionary_digest": "e" * 64, "dictionary_size": 9}, "another dictionary"),
        (config(prefix, faiss_metric_type="ip"), {}, "l2 is there: give --faiss-metric-type l2"),
        (config(prefix, dstore_fp16=True), {}, "holds float32 keys and --dstore-fp16 was given"),
        (config(prefix, dstore_filename=None), {}, "give --dstore-filename PREFIX"),
    ]
    for settings, more, message in cases:
        with pytest.raises(ValueError, match=message):
            open_external(settings, **({"dim": DIM} | more))


def test_an_index_of_another_store_is_refused(prefix):
    flat_index(prefix)
    keys, values = rows()
    with DatastoreWriter(prefix, ROWS, DIM, "float32", META) as writer:
        writer.append(keys + 1, values)
        writer.finish()
    with pytest.raises(ValueError, match="was built over other keys than datastore"):
        open_external(config(prefix), dim=DIM)
    store = Datastore.open(prefix)
    for made, message in (
        (faiss.IndexFlatL2(DIM + 1), "the index is of width 9, datastore .* of 8"),
        (faiss.IndexFlatL2(DIM), "the index holds 0 rows, datastore .* 600"),
    ):
        with pytest.raises(ValueError, match=message):
            ExternalMemory(store, FaissIndex(made, Metric.L2), 1)
    with pytest.raises(ValueError, match="unknown kind of score 'recompte'.*did you mean 'recompute'"):
        ExternalMemory(store, ExactIndex(store.keys), 1, "recompte")

"""Searches against brute force in float64, and the bulk search against faiss itself."""

import copy
import functools

import faiss
import numpy as np
import pytest
import torch
from brute_force import similarities

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.exact.candidates import TrueScores
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss import index as faiss_index
from fairseq.memory.index.faiss.index import FaissIndex, find_index
from fairseq.memory.index.faiss.strategy import SearchStrategy
from fairseq.memory.index.faiss_library import pair_scores_in_place
from fairseq.memory.index.lists.bulk_search import search_in_bulk
from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops.products import by_name
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric, Neighbors

ROWS, DIM = 3000, 16


def made(rows: int, seed: int) -> np.ndarray:
    """Clustered rows, as hidden states are."""
    rng = np.random.default_rng(seed)
    centers = 3 * np.random.default_rng(99).standard_normal((20, DIM))
    return (centers[rng.integers(0, 20, rows)] + rng.standard_normal((rows, DIM))).astype(np.float32)


KEYS = made(ROWS, 0)
QUERIES = torch.from_numpy(made(400, 1))


@functools.cache
def trained(metric: Metric, factory: str) -> faiss.Index:
    measure = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
    keys = KEYS / np.linalg.norm(KEYS, axis=1, keepdims=True) if metric is Metric.COS else KEYS
    index = faiss.index_factory(DIM, factory, measure)
    index.train(keys)
    index.add(keys)
    return index


def made_index(metric: Metric, factory: str = "IVF16,PQ4np") -> FaissIndex:
    found = FaissIndex(faiss.clone_index(trained(metric, factory)), metric)
    found.set_probe(4)
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("k", [1, 7, 2500])
@pytest.mark.parametrize("metric", list(Metric))
def test_exact_search_is_brute_force(metric, k, dtype, monkeypatch):
    monkeypatch.setattr("fairseq.memory.index.exact.index._BLOCK_BYTES", 4 * 400 * 700)  # several uneven blocks
    keys = KEYS.astype(dtype)
    found = ExactIndex(keys, metric).search(QUERIES[:50], k)
    truth = similarities(metric, QUERIES[:50].numpy(), keys)
    best = np.sort(truth, axis=1)[:, ::-1][:, :k]
    np.testing.assert_allclose(found.scores_NK, best, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(truth, found.ids_NK.numpy(), 1), best, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["strided", "fortran", "backwards", "tensor", "half", "bfloat16", "float64"])
def test_exact_search_takes_keys_of_any_layout_and_floating_type(kind):
    wide = np.random.default_rng(0).standard_normal((500, 2 * DIM)).astype(np.float32)
    plain = np.ascontiguousarray(wide[:, ::2])
    keys = {
        "strided": lambda: wide[:, ::2],
        "fortran": lambda: np.asfortranarray(plain),
        "backwards": lambda: plain[::-1].copy()[::-1],
        "tensor": lambda: torch.from_numpy(plain),
        "half": lambda: torch.from_numpy(plain).half(),
        "bfloat16": lambda: torch.from_numpy(plain).bfloat16(),
        "float64": lambda: plain.astype(np.float64),
    }[kind]()
    index = ExactIndex(keys)
    found = index.search(QUERIES[:50], 5)
    stored = keys.float().numpy() if isinstance(keys, torch.Tensor) else np.asarray(keys)
    truth = similarities(Metric.L2, QUERIES[:50].numpy(), stored)
    best = np.sort(truth, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(found.scores_NK, best, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(index.score_rows(QUERIES[:50], found.ids_NK), best, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "keys", [np.zeros((4, 2), np.int32), np.zeros(4, np.float32), torch.zeros(4, 2, dtype=torch.int8)]
)
def test_keys_that_cannot_be_searched_are_refused(keys):
    with pytest.raises(
        ValueError, match=r"keys of shape \(4.*cannot be searched; give a matrix \(rows, dim\) of float"
    ):
        ExactIndex(keys)


def test_exact_search_orders_equal_keys_by_row():
    keys = np.repeat(KEYS[:10], 5, axis=0)
    found = ExactIndex(keys).search(torch.from_numpy(KEYS[:10]), 5)
    assert found.ids_NK.tolist() == [list(range(5 * i, 5 * i + 5)) for i in range(10)]


@pytest.mark.parametrize("metric", list(Metric))
def test_flat_index_is_exact_search(metric):
    found = made_index(metric, "Flat").search(QUERIES, 9)
    truth = ExactIndex(KEYS, metric).search(QUERIES, 9)
    torch.testing.assert_close(found.scores_NK, truth.scores_NK, rtol=1e-4, atol=1e-3)
    assert (found.ids_NK == truth.ids_NK).float().mean() > 0.99


def test_the_closest_has_the_highest_score():
    """One sign for all metrics: the originals negated inner products, so that the least similar won."""
    for metric in Metric:
        index = made_index(metric, "Flat")
        found = index.search(QUERIES[:20], ROWS)
        truth = similarities(metric, QUERIES[:20].numpy(), KEYS)
        assert found.ids_NK[:, 0].tolist() == truth.argmax(1).tolist()
        assert found.ids_NK[:, -1].tolist() == truth.argmin(1).tolist()
        assert (found.scores_NK.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("k", [1, 8, 300])
@pytest.mark.parametrize("metric", list(Metric))
def test_bulk_search_finds_what_faiss_finds(metric, k, products, monkeypatch):
    index = made_index(metric)
    assert index.bulk_pays(len(QUERIES))
    found = index.search(QUERIES, k)
    with monkeypatch.context() as patch:
        patch.setattr(faiss_index, "choose_strategy", lambda *_: SearchStrategy.FAISS)
        truth = index.search(QUERIES, k)
    torch.testing.assert_close(found.scores_NK, truth.scores_NK, rtol=1e-4, atol=2e-4)
    same = torch.tensor([set(a) == set(b) for a, b in zip(found.ids_NK.tolist(), truth.ids_NK.tolist())])
    assert same.all()


def test_ties_are_settled_as_faiss_settles_them(products):
    """Few different codes, so that dozens of keys are equally far: the last places are contested in every search."""
    keys = np.repeat(KEYS[:150], 12, axis=0)[np.random.default_rng(5).permutation(1800)]
    for metric in (Metric.L2, Metric.IP):
        inner = faiss.index_factory(
            DIM, "IVF8,PQ2np", faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        )
        inner.train(keys)
        inner.add(keys)
        index = FaissIndex(inner, metric)
        index.set_probe(3)
        for k in (1, 5, 40):
            found = index.search(QUERIES, k)
            truth = np.sort(inner.search(QUERIES.numpy(), k)[1], axis=1)
            assert (np.sort(found.ids_NK.numpy(), axis=1) == truth).all()


def test_more_ties_than_there_is_room_for_are_left_to_faiss_or_taken_in_order(monkeypatch):
    keys = np.repeat(KEYS[:4], 500, axis=0)
    found = ExactIndex(keys).search(QUERIES, 30)
    nearest = similarities(Metric.L2, QUERIES.numpy(), KEYS[:4]).argmax(1)
    assert found.ids_NK.tolist() == [list(range(500 * at, 500 * at + 30)) for at in nearest]
    inner = faiss.index_factory(DIM, "IVF2,PQ2np")
    inner.train(KEYS)
    inner.add(keys)
    index = FaissIndex(inner, Metric.L2)
    index.set_probe(2)
    truth = np.sort(inner.search(QUERIES.numpy(), 30)[1], axis=1)
    assert (np.sort(index.search(QUERIES, 30).ids_NK.numpy(), axis=1) == truth).all()


def test_lists_give_the_same_bits_on_one_thread_and_on_several():
    lists = DecodedLists(made_index(Metric.L2).inner, products=by_name("plain"))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(Neighbors(*search_in_bulk(lists, QUERIES, 5)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].ids_NK, results[1].ids_NK)
    assert torch.equal(results[0].scores_NK, results[1].scores_NK)


def test_short_lists_leave_ids_of_minus_one(monkeypatch):
    index = made_index(Metric.L2)
    index.set_probe(1)
    for way in set(SearchStrategy) - {SearchStrategy.GPU}:
        monkeypatch.setattr(faiss_index, "choose_strategy", lambda *_, way=way: way)
        found = index.search(QUERIES, 1500)
        missing = found.ids_NK < 0
        assert missing.any()
        assert (found.ids_NK[missing] == -1).all()
        assert torch.isneginf(found.scores_NK[missing]).all()
        assert torch.isfinite(found.scores_NK[~missing]).all()


def test_k_larger_than_the_store():
    for index in (ExactIndex(KEYS), made_index(Metric.L2)):
        with pytest.raises(ValueError, match="--k 3001 is larger than the datastore, which has 3000 rows"):
            index.search(QUERIES, ROWS + 1)
        with pytest.raises(ValueError, match="--k must be at least 1"):
            index.search(QUERIES, 0)
        with pytest.raises(ValueError, match="do not fit an index of width 16"):
            index.search(QUERIES[:, :8], 1)


def test_half_precision_and_empty_queries():
    index = made_index(Metric.L2)
    assert index.search(QUERIES[:3].half(), 2).scores_NK.dtype == torch.float32
    for empty in (index.search(QUERIES[:0], 2), ExactIndex(KEYS).search(QUERIES[:0], 2)):
        assert empty.ids_NK.shape == (0, 2)


def test_names_and_metrics_of_index_files(tmp_path):
    index = made_index(Metric.IP)
    faiss.write_index(index.inner, str(tmp_path / "knn.index.ip"))
    assert find_index(tmp_path / "knn.index", Metric.IP) == tmp_path / "knn.index.ip"
    opened = FaissIndex.open(tmp_path / "knn.index", Metric.IP)
    assert torch.equal(opened.search(QUERIES, 3).ids_NK, index.search(QUERIES, 3).ids_NK)
    opened = FaissIndex.open(tmp_path / "knn.index.ip", Metric.IP, mapped=True)
    opened.set_probe(4)
    assert torch.equal(opened.search(QUERIES, 3).ids_NK, index.search(QUERIES, 3).ids_NK)
    with pytest.raises(ValueError, match=r"knn.index.ip is there: give --faiss-metric-type ip"):
        FaissIndex.open(tmp_path / "knn.index", Metric.L2)
    with pytest.raises(ValueError, match=r"uses metric ip but --faiss-metric-type is l2; pass --faiss-metric-type ip"):
        FaissIndex.open(tmp_path / "knn.index.ip", Metric.L2)
    (tmp_path / "knn.index.ip").rename(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"uses metric ip but --faiss-metric-type is l2; pass --faiss-metric-type ip"):
        FaissIndex.open(tmp_path / "plain", Metric.L2)
    with pytest.raises(ValueError, match=r"no index at .*build it with build_dstore.py"):
        FaissIndex.open(tmp_path / "nothing", Metric.L2)
    (tmp_path / "plain").write_bytes((tmp_path / "plain").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a whole faiss index"):
        FaissIndex.open(tmp_path / "plain", Metric.IP)


def test_probe_is_clamped_and_checked():
    index = made_index(Metric.L2)
    index.set_probe(1000)
    assert index.inner.nprobe == 16
    with pytest.raises(ValueError, match="--probe must be at least 1, got 0"):
        index.set_probe(0)
    made_index(Metric.L2, "Flat").set_probe(8)


def test_rows_that_do_not_exist_are_refused():
    index = made_index(Metric.L2)
    with pytest.raises(ValueError, match="returned row 3000 of 3000"):
        index._checked(torch.tensor([[ROWS]]), torch.zeros(1, 1))


def test_unsorted_results_are_sorted():
    found = made_index(Metric.L2)._checked(torch.tensor([[4, -1, 9]]), torch.tensor([[-3.0, 0.0, -1.0]]))
    assert found.ids_NK.tolist() == [[9, 4, -1]]
    assert found.scores_NK.tolist() == [[-1.0, -3.0, -torch.inf]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("metric", list(Metric))
def test_scores_of_pairs(metric, dtype):
    keys = KEYS.astype(dtype)
    ids = torch.randint(-1, ROWS, (len(QUERIES), 5))
    truth = np.take_along_axis(similarities(metric, QUERIES.numpy(), keys), ids.clamp_min(0).numpy(), 1)
    truth[ids.numpy() < 0] = -np.inf
    scores = TrueScores(ChunkedArray.of(keys), metric, normalized(QUERIES) if metric is Metric.COS else QUERIES)
    for query, row in enumerate(ids.numpy()):
        np.testing.assert_allclose(scores.of(query, row[row >= 0]), truth[query, row >= 0], rtol=1e-5, atol=1e-4)
    if metric is not Metric.COS and dtype is np.float32:
        np.testing.assert_allclose(pair_scores_in_place(metric, QUERIES, keys, ids), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("factory", ["IVF16,PQ4x4fs", "PQ4x4fs", "IVF16,PQ4np", "IVF16,SQ8", "Flat", "HNSW8", "SQ8"])
def test_what_a_freed_array_held_decides_nothing(metric, factory, monkeypatch):
    """faiss 1.15.1 reads the distances of fast-scan lists before it writes them; the greatest float hid all rows."""
    index = made_index(metric, factory)
    index.set_probe(16)
    worst = np.finfo(np.float32).max * (-1 if metric is Metric.L2 else 1)
    original = np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **b: _filled(original(*a, **b), worst))
    for k in (1, 2, 4, 10, 20, 21, 64):
        for count in (1, 3, 40):
            found = index.search(QUERIES[:count], k)
            assert bool((found.ids_NK >= 0).all()), (k, count)
            truth = similarities(metric, QUERIES[:count].numpy(), KEYS)
            best = np.sort(truth, axis=1)[:, ::-1][:, :k]
            mine = np.take_along_axis(truth, found.ids_NK.numpy(), 1)
            # Codes of 4 bits are coarse: the rows found must be among the better half of all.
            assert (mine >= np.median(truth, axis=1, keepdims=True)).mean() > 0.8
            if factory == "Flat":
                np.testing.assert_allclose(mine, best, rtol=1e-4, atol=1e-3)


def _filled(array, value):
    if array.dtype == np.float32:
        array.fill(value)
    return array


@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
def test_a_graph_finds_k_rows_although_most_are_deleted(metric):
    kept = np.random.default_rng(0).choice(ROWS, 60, replace=False)  # 2%
    recalls = []
    for deleted in (np.empty(0, np.int64), np.setdiff1d(np.arange(ROWS), kept)):
        index = FaissIndex(faiss.clone_index(trained(metric, "HNSW16")), metric, deleted=deleted)
        index.set_probe(16)
        found = index.search(QUERIES, 8).ids_NK
        assert bool((found >= 0).all())
        assert not np.isin(found.numpy(), deleted).any()
        alive = np.setdiff1d(np.arange(ROWS), deleted)
        truth = alive[ExactIndex(KEYS[alive], metric).search(QUERIES, 8).ids_NK.numpy()]
        recalls.append(np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found.tolist(), truth.tolist())]))
    # By inner products a graph has keys of small norm that no link leads to, however many rows are in view.
    assert recalls[1] > (recalls[0] - 0.05 if metric is Metric.L2 else 0.6), recalls


def test_a_copy_reads_the_lists_of_its_own_index():
    index = made_index(Metric.L2)
    wanted = index.search(QUERIES[:1], 500)  # by tables, which know where the codes are
    index.search(QUERIES, 500)
    copied = copy.deepcopy(index)
    assert copied._tables is None
    assert torch.equal(copied.search(QUERIES[:1], 500).ids_NK, wanted.ids_NK)
    ours, theirs = (each._tables._lists.address_L2 for each in (copied, index))
    assert not np.isin(ours[ours > 0], theirs).any()

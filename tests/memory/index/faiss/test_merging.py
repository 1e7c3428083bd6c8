"""Results of GPUs, which may be out of order, repeated, cut off or missing, made right or marked as doubtful."""

import faiss
import numpy as np
import pytest
import torch

from fairseq.memory.index.faiss import gpu
from fairseq.memory.index.faiss.gpu import GpuSearch
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.ops.merging import merged
from fairseq.memory.types import Metric

ROWS, DIM = 900, 8
KEYS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
QUERIES = torch.from_numpy(np.random.default_rng(1).standard_normal((40, DIM)).astype(np.float32))


class FakeGpuIndex:
    """Searches rightly, then does to the result what GPU libraries were seen to do."""

    def __init__(self, inner, fault):
        self.inner, self.fault = faiss.clone_index(inner), fault  # a GPU has a copy

    @property
    def nprobe(self):
        return self.inner.nprobe

    @nprobe.setter
    def nprobe(self, probe):
        self.inner.nprobe = probe

    @property
    def ntotal(self):
        return self.inner.ntotal

    def search(self, query, k, *, params=None, D, I):  # noqa: E741 (faiss names them so)
        assert k <= gpu.MOST_NEIGHBORS
        distances, ids = self.inner.search(query, k, params=params)
        D[:], I[:] = self.at_fault(k, distances, ids)

    def at_fault(self, k, distances, ids):
        order = np.random.default_rng(0).permutation(k)
        if self.fault == "unsorted":
            return distances[:, order], ids[:, order]
        if self.fault == "missing" and k > 2:
            ids[::3, 1], distances[::3, 1] = -1, np.inf
        if self.fault == "repeated" and k > 2:
            ids[::3, 1] = ids[::3, 0]
        if self.fault == "nan" and k > 2:
            distances[::3, 1] = np.nan
        return distances, ids


def index_on(factory, metric, fault, monkeypatch, part_bytes=1 << 30, limit=2048):
    inner = faiss.index_factory(DIM, factory, faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT)
    inner.train(KEYS)
    inner.add(KEYS)
    monkeypatch.setattr(gpu, "MOST_NEIGHBORS", limit)
    monkeypatch.setattr(GpuSearch, "_on_gpu", lambda _, part, device: FakeGpuIndex(part, fault))
    index = FaissIndex(inner, metric)
    index._by_gpu = GpuSearch(inner, [0, 1], part_bytes)
    return index


@pytest.mark.parametrize("fault", ["none", "unsorted", "missing", "repeated", "nan"])
@pytest.mark.parametrize("metric", [Metric.L2, Metric.IP])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
@pytest.mark.parametrize("k", [1, 30, 300])
def test_the_neighbours_are_those_of_the_processor(factory, metric, fault, k, monkeypatch):
    index = index_on(factory, metric, fault, monkeypatch, limit=64)
    index.set_probe(8)
    found = index.search(QUERIES, k)
    truth = FaissIndex(index.inner, metric).search(QUERIES, k)
    torch.testing.assert_close(found.scores_NK, truth.scores_NK, rtol=1e-5, atol=1e-5)
    assert (found.ids_NK == truth.ids_NK).float().mean() > 0.999


def test_parts_that_do_not_fit_take_turns_and_those_that_do_stay(monkeypatch):
    made = []
    index = index_on("IVF8,Flat", Metric.L2, "none", monkeypatch, part_bytes=8000)
    plain = GpuSearch._cut
    monkeypatch.setattr(GpuSearch, "_cut", lambda self, number: (made.append(number), plain(self, number))[1])
    index.set_probe(8)
    truth = FaissIndex(index.inner, Metric.L2).search(QUERIES, 5)
    assert torch.equal(index.search(QUERIES, 5).ids_NK, truth.ids_NK)
    parts = len(made)
    assert parts > 2
    index.search(QUERIES, 5)
    assert len(made) == 2 * parts
    index._by_gpu = GpuSearch(index.inner, [0, 1], 1 << 30)
    made.clear()
    for _ in range(2):
        assert torch.equal(index.search(QUERIES, 5).ids_NK, truth.ids_NK)
    assert made == [0]


def test_deleted_rows_are_not_found_on_gpus(monkeypatch):
    index = index_on("Flat", Metric.L2, "unsorted", monkeypatch)
    nearest = index.search(QUERIES, 20).ids_NK
    index.deleted = np.unique(nearest.numpy())
    found = index.search(QUERIES, 20).ids_NK
    assert not np.isin(found.numpy(), index.deleted).any()
    assert (found >= 0).all()


def test_a_query_is_in_doubt_when_a_part_may_have_told_too_little():
    left = (torch.tensor([[0, 1], [0, 1]]), torch.tensor([[9.0, 8.0], [9.0, 1.0]]))
    right = (torch.tensor([[5, 6], [5, 6]]), torch.tensor([[7.0, 6.0], [7.0, 0.5]]))
    ids, scores, doubt = merged([left, right], [50, 50], 3)
    assert ids.tolist() == [[0, 1, 5], [0, 5, 1]]
    assert scores.tolist() == [[9.0, 8.0, 7.0], [9.0, 7.0, 1.0]]
    assert doubt.tolist() == [0, 1]  # a third row of the left part may be better than the last that is told
    assert merged([left, right], [2, 2], 3)[2].tolist() == []  # there is no third row
    ids, scores, doubt = merged([left], [2], 4)
    assert ids[0].tolist() == [0, 1, -1, -1]
    assert scores[0, 2:].tolist() == [-torch.inf, -torch.inf]


def test_where_the_gpu_cannot_the_processor_goes_on(monkeypatch, caplog):
    index = index_on("IVF8,Flat", Metric.L2, "none", monkeypatch)
    index.set_probe(3)
    before = index.search(QUERIES, 5).ids_NK
    index.set_probe(8)
    truth = FaissIndex(index.inner, Metric.L2).search(QUERIES, 5).ids_NK
    assert not torch.equal(before, truth)
    assert torch.equal(index.search(QUERIES, 5).ids_NK, truth)  # the probe counts for parts that were there before

    def fails(self, query, k, **_):
        raise RuntimeError("Error in virtual void somewhere: Error: 'codes' failed: not supported")

    monkeypatch.setattr(FakeGpuIndex, "search", fails)
    for _ in range(2):
        assert torch.equal(index.search(QUERIES, 5).ids_NK, truth)
    assert caplog.text.count("is searched on the CPU from now on") == 1


def test_without_a_gpu_one_line_says_so(caplog):
    caplog.set_level("INFO")
    inner = faiss.IndexFlatL2(DIM)
    index = FaissIndex(inner, Metric.L2, "the index")
    index.use_gpus()
    assert index._by_gpu is None
    assert [r.message for r in caplog.records if "searched on the CPU" in r.message] == [
        "the index is searched on the CPU: there is no GPU"
    ]

"""An index with later rows, against exact search of all rows."""

import numpy as np
import pytest
import torch

from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.grown import GrownIndex
from fairseq.memory.types import Metric

KEYS = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
QUERIES = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))


def grown(metric=Metric.L2, first_deleted=(), later_deleted=()):
    first = ExactIndex(KEYS[:200], metric, deleted=np.array(first_deleted, np.int64))
    return GrownIndex(first, ExactIndex(KEYS[200:], metric, deleted=np.array(later_deleted, np.int64)))


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("k", [1, 5, 250])
def test_both_parts_are_searched_as_one(metric, k):
    found = grown(metric).search(QUERIES, k)
    wanted = ExactIndex(KEYS, metric).search(QUERIES, k)
    assert torch.equal(found.ids_NK, wanted.ids_NK)
    torch.testing.assert_close(found.scores_NK, wanted.scores_NK)


def test_deleted_rows_of_both_parts_are_never_found():
    index = grown(first_deleted=[3, 199], later_deleted=[0, 99])
    assert index.deleted.tolist() == [3, 199, 200, 299]
    assert len(index) == 300
    found = index.search(QUERIES, 296)
    assert not np.isin(found.ids_NK.numpy(), index.deleted).any()
    with pytest.raises(ValueError, match="which has 296 rows"):
        index.search(QUERIES, 297)


def test_rows_are_scored_wherever_they_are():
    ids_NM = torch.tensor([[0, 250, -1, 199, 200]] * 7)
    scores = grown().score_rows(QUERIES, ids_NM)
    wanted = -((torch.from_numpy(KEYS)[ids_NM] - QUERIES[:, None]) ** 2).sum(2)
    torch.testing.assert_close(scores[:, [0, 1, 3, 4]], wanted[:, [0, 1, 3, 4]])
    assert torch.isneginf(scores[:, 2]).all()


def test_parts_that_differ_are_rejected():
    with pytest.raises(ValueError, match="width 8 and metric l2 .* width 8 by ip"):
        GrownIndex(ExactIndex(KEYS), ExactIndex(KEYS, Metric.IP))

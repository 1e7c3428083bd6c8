from __future__ import annotations

import numpy as np
import pytest
import torch
from store_making import save_keys

from fairseq.memory.proof.tally import MassTally
from fairseq.memory.proof.ties import has_tied_end
from fairseq.memory.sources.external import ExternalMemory


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Keys on a line: three at 1 (but for rounding), and one at each whole number from 2 on."""
    keys = np.zeros((10, 4), np.float32)
    keys[:, 0] = [1, np.nextafter(np.float32(1), np.float32(2)), 1, 2, 3, 4, 5, 6, 7, 8]
    return save_keys(tmp_path_factory.mktemp("ties") / "store", keys)


@pytest.mark.parametrize(("k", "is_tied"), [(1, True), (2, True), (3, False), (4, False), (10, False)])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_equally_near_rows_at_the_end(prefix, k, is_tied, metric):
    memory = ExternalMemory.open(str(prefix), k=k, metric=metric)
    query_D = torch.tensor([0.5 if metric == "l2" else -1.0, 0, 0, 0])
    assert has_tied_end(memory, query_D) is is_tied


def test_only_what_differs_is_asked_about():
    tally = MassTally(masses=[1.0])
    tally.compare(-1.0, -1.0, lambda: pytest.fail("asked"))
    tally.compare(-1.0, -2.0, lambda: True)
    assert (tally.differences, tally.num_tied) == ([0.0], 1)
    assert tally.verdict().passed
    assert "(1 with neighbours at one distance are left out)" in tally.verdict().words
    tally.compare(-1.0, float("nan"), lambda: False)
    assert tally.verdict().passed is False

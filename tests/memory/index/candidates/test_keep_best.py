"""The k best candidates that are kept in place are those of sorting all."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq.memory.index.candidates.kernels import keep_best
from fairseq.memory.index.ops.numba_library import numba

keep = numba.njit(lambda scores, ids, filled, k: keep_best(scores, ids, filled, k))


def expected(scores, ids, k):
    is_there = ~np.isnan(scores)
    by_rank = np.lexsort((ids[is_there], -scores[is_there]))[:k]
    return sorted(zip(scores[is_there][by_rank].tolist(), ids[is_there][by_rank].tolist()))


@pytest.mark.parametrize("behind", [0, 3, 16, 100])
@pytest.mark.parametrize("values", [4, 1 << 20])
@pytest.mark.parametrize(("filled", "k"), [(0, 1), (5, 9), (9, 9), (40, 17), (300, 120), (1090, 1024)])
def test_equals_are_kept_by_the_lowest_rows(filled, k, values, behind):
    draw = np.random.default_rng(filled)
    scores = draw.integers(-values, values, filled + behind).astype(np.float32) / 7
    scores[draw.random(len(scores)) < 0.02] = -np.inf
    scores[draw.random(len(scores)) < 0.02] = np.nan
    ids = draw.permutation(filled + behind).astype(np.int32)
    wanted = expected(scores[:filled], ids[:filled], k)
    kept = keep(scores, ids, filled, k)
    assert kept == len(wanted) <= k
    assert sorted(zip(scores[:kept].tolist(), ids[:kept].tolist())) == wanted

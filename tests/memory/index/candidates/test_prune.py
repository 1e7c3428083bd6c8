"""Dropping the candidates of a query that cannot be among its best."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fairseq.memory.index.candidates.kernels import prune

pruned = numba.njit(lambda lower, ids, filled, k, threshold, width: prune(lower, ids, filled, k, threshold, width))


@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("room", [0, 15, 16, 100])  # vectors of 16 are read and written where there is room for one
@pytest.mark.parametrize("filled", [1, 5, 16, 17, 40, 333])
def test_those_stay_whose_bounds_reach_the_threshold_less_their_width(ids_dtype, room, filled):
    draw = np.random.default_rng(filled)
    for k in {1, 1 + filled // 2}:
        lower = draw.standard_normal(filled + room).astype(np.float32)
        lower[draw.random(len(lower)) < 0.1] = np.nan
        ids, before = draw.integers(0, 1 << 20, len(lower)).astype(ids_dtype), lower.copy()
        ids_before = ids.copy()
        kept, threshold = pruned(lower, ids, filled, k, np.float32(-1.0), np.float32(0.25))
        stays = before[:filled] >= np.float32(threshold - np.float32(0.25))
        assert kept == stays.sum()
        np.testing.assert_array_equal(lower[:kept], before[:filled][stays])
        np.testing.assert_array_equal(ids[:kept], ids_before[:filled][stays])
        finite = np.sort(before[:filled][~np.isnan(before[:filled])])[::-1]
        assert threshold == -1.0 if len(finite) < k else threshold <= max(-1.0, finite[k - 1])

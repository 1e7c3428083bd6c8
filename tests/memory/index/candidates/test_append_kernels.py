"""Candidates that are appended as vectors are those that are appended one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fairseq.memory.index.candidates.append_kernels import append_vectors, num_bits, packs_vectors
from fairseq.memory.index.ops.numba_library import numba

KEYS, ROOM, KEY, FIRST = 192, 200, 64, 1000


@numba.njit
def append(raw_X, hits, step, weight, size, bias, slack, query, lower_NC, ids_NC, filled, widest):
    return append_vectors(
        raw_X, hits, step, weight, size, bias, slack, KEY, FIRST, query, lower_NC, ids_NC, 1, filled, widest
    )


@pytest.mark.skipif(not packs_vectors(), reason="the CPU does not pack vectors")
@pytest.mark.parametrize("raw_dtype", [np.int32, np.float32])
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("share_of_hits", [0.0, 0.05, 0.6, 1.0])
def test_vectors_hold_what_is_appended_one_by_one(raw_dtype, ids_dtype, share_of_hits):
    draw = np.random.default_rng(0)
    about = draw.random((5, KEYS), dtype=np.float32)
    raw_X = draw.integers(-1000, 1000, 64).astype(raw_dtype)
    is_hit = draw.random(64) < share_of_hits
    hits = sum(1 << place for place in np.flatnonzero(is_hit).tolist())
    zero, scale, width, share, slack, part = query = tuple(draw.random(6, dtype=np.float32))
    lower_NC, ids_NC = np.full((3, ROOM), -7, np.float32), np.full((3, ROOM), -7, ids_dtype)
    given = (raw_X, np.int64(np.uint64(hits).view(np.int64)), *about, query, lower_NC, ids_NC, 5, np.float32(0.01))
    filled, widest = append(*given)

    step, weight, size, bias, own_slack = about[:, KEY : KEY + 64].astype(np.float64)
    error = size * width
    bound = ((raw_X + np.float64(zero)) * step + weight) * scale + error + bias
    below = 2.0 * (error + own_slack + slack) * part
    expected = (bound - below + share + slack)[is_hit]
    assert filled == 5 + is_hit.sum()
    np.testing.assert_allclose(lower_NC[1, 5:filled], expected, rtol=1e-5, atol=1e-3)
    assert ids_NC[1, 5:filled].tolist() == (FIRST + KEY + np.flatnonzero(is_hit)).tolist()
    assert widest == pytest.approx(max([0.01, *below[is_hit]]), rel=1e-5)
    assert (lower_NC[[0, 2]] == -7).all(), "other queries' candidates"
    assert (lower_NC[1, :5] == -7).all(), "candidates so far"
    assert (lower_NC[1, 5 + 64 :] == -7).all(), "more than a tile"


def test_bits_are_counted():
    @numba.njit
    def count(bits):
        return num_bits(bits)

    assert [count(x) for x in (0, 1, 6, -1)] == [0, 1, 2, 64]

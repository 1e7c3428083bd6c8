"""Sums over columns against the order that is written down, in NumPy, to the last bit."""

import numba
import numpy as np
import pytest

from fairseq.memory.index.exact import kernels as exact_kernels
from fairseq.memory.index.ops import kernels
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances


def summed(terms: np.ndarray) -> np.float32:
    """16 lanes, then 8, then one."""
    whole = len(terms) // 16 * 16
    lanes = np.zeros(16, np.float32)
    for start in range(0, whole, 16):
        lanes += terms[start : start + 16]
    lanes = lanes[:8] + lanes[8:]
    if len(terms) - whole >= 8:
        lanes += terms[whole : whole + 8]
        whole += 8
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    total = lanes[0]
    for term in terms[whole:]:
        total = np.float32(total + term)
    return total


@numba.njit
def of_three(query, a, b, c):
    return products(query, (a, b, c)), squared_distances(query, (a, b, c))


@pytest.mark.parametrize("width", [*range(36), 130, 1024])
def test_every_loop_sums_alike(width):
    rng = np.random.default_rng(width)
    query, keys = rng.standard_normal(width, dtype=np.float32), rng.standard_normal((3, width), dtype=np.float32)
    dots = [summed(query * key) for key in keys]
    squares = [summed((query - key) ** 2) for key in keys]
    assert of_three(query, *keys) == (tuple(dots), tuple(squares))
    assert [kernels.dot(query, key) for key in keys] == dots
    assert [-kernels.neg_sq_l2(query, key) for key in keys] == squares
    for by_distance, expected in ((False, dots), (True, [-x for x in squares])):
        row, pairs = np.zeros(3, np.int64), np.empty(3, np.float32)
        exact_kernels.score_pairs(query[None], row, keys, np.arange(3), by_distance, pairs)
        assert pairs.tolist() == expected
        chosen = (np.zeros(1, np.float32), np.ones((1, 3), np.float32), np.arange(3)[None], np.array([3]))
        true = np.full((1, 3), np.nan, np.float32)
        exact_kernels.score_candidates(query[None], keys, 0, by_distance, *chosen, true)
        assert true[0].tolist() == expected


def test_rows_with_gaps_are_refused():
    rows = np.ones((4, 4), np.float32)
    with pytest.raises(numba.TypingError, match="float32 without gaps"):
        kernels.dot(rows[0], rows[:, 0])

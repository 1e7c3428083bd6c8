"""Sums over columns against the order that is written down, in NumPy, to the last bit."""

import importlib
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from conftest import ROOT

from fairseq.memory.index.exact import kernels as exact_kernels
from fairseq.memory.index.ops import kernels
from fairseq.memory.index.ops.bounded_scores import kernel_rows
from fairseq.memory.index.ops.half_kernels import READS_FLOAT16
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
def dot(a_D, b_D):
    return kernels.dot(a_D, b_D)


@numba.njit
def neg_sq_l2(a_D, b_D):
    return kernels.neg_sq_l2(a_D, b_D)


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
    assert [dot(query, key) for key in keys] == dots
    assert [-neg_sq_l2(query, key) for key in keys] == squares
    for by_distance, expected in ((False, dots), (True, [-x for x in squares])):
        row, pairs = np.zeros(3, np.int64), np.empty(3, np.float32)
        exact_kernels.score_pairs(query[None], row, keys, np.arange(3), by_distance, pairs)
        assert pairs.tolist() == expected
        unused = np.zeros(1, np.float32)
        candidates = (np.ones((1, 3), np.float32), np.arange(3)[None], np.array([3]), unused, unused)
        true = np.full((1, 3), np.nan, np.float32)
        exact_kernels.score_candidates(query[None], keys, 0, by_distance, np.zeros(1, np.float32), candidates, true)
        assert true[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 41, 300])
def test_keys_of_16_bits_are_summed_as_their_float32(dtype, width):
    made = torch.Generator().manual_seed(width)
    query, key_MD = torch.randn(width, generator=made).numpy(), torch.randn(7, width, generator=made).to(dtype)
    key_MD[1, 0], key_MD[2, 0], key_MD[3, -1] = 6e-8, -6e-5, 30000.0  # the least, and the greatest, of float16
    held, wide = kernel_rows(key_MD), key_MD.float().numpy()
    assert held.itemsize == (2 if dtype is torch.bfloat16 or READS_FLOAT16 else 4)
    row_H = np.array([6, 0, 1, 2, 3, 5])
    for by_distance in (False, True):
        expected, found = np.empty((2, len(row_H)), np.float32)
        exact_kernels.score_some(query, wide, row_H, by_distance, expected)
        exact_kernels.score_some(query, held, row_H, by_distance, found)
        terms = [(query - key) ** 2 if by_distance else query * key for key in wide[row_H]]
        assert expected.tolist() == [-summed(each) if by_distance else summed(each) for each in terms]
        assert found.tolist() == expected.tolist()


def test_rows_with_gaps_are_refused():
    rows = np.ones((4, 4), np.float32)
    with pytest.raises(numba.TypingError, match="without gaps"):
        dot(rows[0], rows[:, 0])


@pytest.mark.parametrize("module", ["ops.kernels", "exact.kernels", "lists.bulk_kernels", "lists.adc_kernels"])
def test_no_kernel_leaves_its_arithmetic_to_its_first_caller(module):
    functions = vars(importlib.import_module(f"fairseq.memory.index.{module}")).values()
    kernels_of_module = [function for function in functions if hasattr(function, "targetoptions")]
    assert kernels_of_module
    assert all("fastmath" in kernel.targetoptions for kernel in kernels_of_module)


def test_sums_are_the_same_when_a_caller_that_may_fuse_is_compiled_first(tmp_path):
    """In a process of its own with an empty cache: what is compiled first is what counts."""
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal(64, dtype=np.float32), rng.standard_normal((200, 64), dtype=np.float32)
    np.savez(tmp_path / "rows.npz", query=query, keys=keys)
    code = f"""
import numpy as np
import numba
from fairseq.memory.index.lists.adc_kernels import share_of_list
from fairseq.memory.index.ops.kernels import dot, neg_sq_l2
rows = np.load({str(tmp_path / "rows.npz")!r})
numba.njit(lambda a, b: share_of_list(a, b, True))(rows["query"], rows["keys"][0])
functions = [numba.njit(lambda a, b: dot(a, b)), numba.njit(lambda a, b: neg_sq_l2(a, b))]
sums = [[function(rows["query"], key) for key in rows["keys"]] for function in functions]
np.save({str(tmp_path / "sums.npy")!r}, np.array(sums, np.float32))
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    expected = [[summed(query * key) for key in keys], [-summed((query - key) ** 2) for key in keys]]
    assert np.load(tmp_path / "sums.npy").tolist() == np.array(expected).tolist()

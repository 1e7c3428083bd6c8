"""What a processor may choose, chosen on this one: the bits that are promised are the same whatever it is.

Fixture ``products`` takes the ways of each kind of processor in turn; here the libraries are held back as well.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from brute_force import similarities
from conftest import ROOT

from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.ops.kmeans import assign
from fairseq.memory.types import Metric
from fairseq.runtime import hardware

WIDTH, NUM_QUERIES = 44, 70
PIECES = (1, 31, 32, 70)  # 32 queries and more are searched in another way than fewer

# Lesser processors that libraries can be held to, and what would be surprised by them: whatever promises bits.
MIXING = (
    "tests/memory/test_log_space.py",
    "tests/memory/retomaton/test_retomaton.py::test_without_pointers_it_is_knn_lm_bit_for_bit",
)
LESSER = {
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "FAISS_OPT_LEVEL": "avx2"}, MIXING),
    "plain": ({"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "FAISS_OPT_LEVEL": "generic"}, MIXING),
    "compiled for any": ({"NUMBA_CPU_NAME": "generic"}, ("tests/memory/index/ops/test_lane_sum_kernels.py",)),
}


def made(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH), dtype=np.float32)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("k", [5, 900])  # many are not searched in lists
def test_exact_search_has_the_same_bits_by_any_products_in_any_company(metric, k, products, threads):
    keys, queries = made(3000, 0), made(NUM_QUERIES, 1)
    query_ND, index = torch.from_numpy(queries), ExactIndex(keys, metric)
    alone = ExactIndex(keys, metric).search(query_ND[:1], k)
    truth = np.take_along_axis(similarities(metric, queries[:1], keys), alone.ids_NK.numpy(), 1)
    np.testing.assert_allclose(alone.scores_NK, truth, atol=1e-4)
    whole = index.search(query_ND, k)
    for size in PIECES:
        parts = [index.search(part, k) for part in query_ND.split(size)[:3]]
        ids, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids_NK", "scores_NK"))
        assert torch.equal(ids, whole.ids_NK[: len(ids)])
        assert torch.equal(scores, whole.scores_NK[: len(ids)])
    assert torch.equal(alone.scores_NK, whole.scores_NK[:1])


def test_exact_search_takes_the_ways_that_are_forced(products, monkeypatch):
    from fairseq.memory.index.exact import index as exact

    taken = []
    for name in ("Int8Filter", "FloatFilter", "_Blocks"):
        kind = getattr(exact, name)
        monkeypatch.setattr(exact, name, lambda *a, kind=kind, **b: taken.append(kind(*a, **b)) or taken[-1])
    monkeypatch.setattr(ExactIndex, "_has_wide_bounds", lambda *_: False)
    query_ND, index = torch.from_numpy(made(40, 1)), ExactIndex(made(3000, 0))
    for k in (5, 900):
        index.search(query_ND, k)
    lists, by = taken
    assert lists.dtype is (torch.int8 if products == "int8" else torch.float32)
    assert by.quantized_ND.dtype is getattr(torch, products)


def test_centroids_are_the_same_by_any_products(monkeypatch, threads):
    keys, centroids = torch.from_numpy(made(3000, 0)), torch.from_numpy(made(90, 1))
    near = []
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        monkeypatch.setattr(hardware, "fast_products", lambda dtype=dtype: dtype)
        near.append(assign(keys, centroids))
    assert torch.equal(near[0], near[1])
    assert torch.equal(near[0], near[2])


@pytest.mark.parametrize(
    ("flags", "has_bfloat16", "expected"),
    [
        ({"avx2"}, False, torch.float32),
        ({"avx512f"}, True, torch.bfloat16),
        ({"avx512_vnni"}, True, torch.int8),
        ({"avx_vnni"}, False, torch.int8),
        ({"amx_int8"}, True, torch.int8),
        (set(), False, torch.float32),
    ],
)
def test_the_processor_is_asked_in_one_place(flags, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", lambda: flags)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert hardware.fast_products.__wrapped__() is expected
    if expected is torch.int8:
        monkeypatch.delattr(torch, "_int_mm")
        assert hardware.fast_products.__wrapped__() is not torch.int8


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LESSER))
def test_a_lesser_processor_surprises_nobody(name):
    if name == "avx2" and "avx2" not in hardware.cpu_features():
        pytest.skip("this processor has no such instructions")
    settings, tests = LESSER[name]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

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
from conftest import PRODUCTS, ROOT, set_fast_products

from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.kmeans.kmeans import assign
from fairseq.memory.index.ops import kernel_cache, numba_library
from fairseq.memory.index.ops import products as ways
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
    monkeypatch.setattr(ExactIndex, "_passing_share", lambda *_: 0.0)
    kinds = {name: getattr(exact, name) for name in ("RoundedQueries", "CandidateGroup", "StreamedGroup")}
    for name, kind in kinds.items():
        monkeypatch.setattr(exact, name, _noting(kind, taken))
    query_ND = torch.from_numpy(made(40, 1))
    for wide, kind in ((False, "CandidateGroup"), (True, "StreamedGroup")):
        taken.clear()
        monkeypatch.setattr(ExactIndex, "_has_wide_bounds", lambda *_, wide=wide: wide)
        ExactIndex(made(3000, 0)).search(query_ND, 900)
        by = next(each for each in taken if type(each) is kinds["RoundedQueries"])
        assert by.products.name == products
        assert {type(each) for each in taken} == {kinds["RoundedQueries"], kinds[kind]}


def _noting(kind: type, made_things: list) -> type:
    class Noting(kind):
        def __new__(cls, *args, **named):
            thing = kind(*args, **named)
            made_things.append(thing)
            return thing

    return Noting


def test_centroids_are_the_same_by_any_products(monkeypatch, threads):
    keys, centroids = torch.from_numpy(made(3000, 0)), torch.from_numpy(made(90, 1))
    near = []
    for name in PRODUCTS:
        with monkeypatch.context() as patch:
            set_fast_products(patch, name)
            near.append(assign(keys, centroids))
    assert all(torch.equal(near[0], other) for other in near[1:])


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"avx2": 3.0, "float32": 1.0}, "avx2"),
        ({"avx2": 1.1, "float32": 1.0}, "float32"),  # rounding, and scoring again, would cost more
        ({"avx512_vnni": 4.0, "library_int8": 5.0, "bfloat16": 2.0, "float32": 1.0}, "library_int8"),
        ({"plain": 0.9, "bfloat16": 2.0, "float32": 1.0}, "bfloat16"),
    ],
)
def test_the_fastest_products_are_taken(rates, expected, monkeypatch):
    monkeypatch.setattr(ways, "measured", lambda: rates)
    assert ways._chosen.__wrapped__("").name == expected


def test_every_rate_is_measured_once_and_kept(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir(mode=0o700)
    monkeypatch.setattr(kernel_cache, "cache_folder", lambda: tmp_path / "kernels")
    asked = []
    monkeypatch.setattr(ways, "_rate", lambda products: asked.append(products.name) or len(asked) * 1e9)
    rates = ways.measured.__wrapped__()
    assert set(rates) == set(asked)
    assert "float32" in rates
    assert ways.measured.__wrapped__() == rates
    assert len(asked) == len(rates)
    (kept,) = (tmp_path / "kernels").glob("products-*.json")
    for damaged in ("", "{}", '{"float32": "fast"}', '{"float32": -1}', "[1]"):
        kept.write_text(damaged, encoding="ascii")
        asked.clear()
        assert set(ways.measured.__wrapped__()) == set(asked) == set(rates)


def test_products_are_forced_by_name(monkeypatch):
    assert ways._chosen.__wrapped__("float32").name == "float32"
    with pytest.raises(ValueError, match=r"FAIRSEQ_PRODUCTS: 'int7' is no way to multiply; these are: .*avx2.*float32"):
        ways._chosen.__wrapped__("int7")
    monkeypatch.setattr(ways, "available", lambda: ["float32", "plain"])
    with pytest.raises(ValueError, match="FAIRSEQ_PRODUCTS=avx2: this processor has no such products; it has float32"):
        ways._chosen.__wrapped__("avx2")


def test_tiles_are_compiled_only_for_what_the_compiler_may_use(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"avx2", "avx512f", "avx512_vnni"})
    monkeypatch.setattr(hardware, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(numba_library, "compiler_features", lambda: {"avx2"})
    assert ways.available() == ["avx2", "library_int8", "float32", "plain", "avx2_fine", "plain_fine"]
    monkeypatch.setattr(numba_library, "compiler_features", set)
    assert ways.available() == ["library_int8", "float32", "plain", "plain_fine"]


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

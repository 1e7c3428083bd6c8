"""Sums of candidates by the compiled loop, against sums of exponentials in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.memory.index.ops.numba_library import numba
from fairseq.memory.sources.float_kernels import exp
from fairseq.memory.sources.log_sums import RowSums, log_sums
from fairseq.memory.types import Candidates, LogSums, Neighbors


def drawn(seed, n, m, *, shared=False, keep=0.7, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 5, (1 if shared else n, m), generator=g)
    scores = torch.randn(n, m, generator=g) * spread
    return Candidates(values, scores, torch.rand(n, m, generator=g) < keep), torch.randint(0, 5, (n,), generator=g)


def counted(found, target, temperature):
    """The logarithms of both sums, from all exponentials in float64."""
    scores = found.scores_NM.double().div(temperature).masked_fill(~found.keep_NM, -math.inf)
    return scores.masked_fill(found.values_NM != target[:, None], -math.inf).logsumexp(1), scores.logsumexp(1)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    m=st.sampled_from([0, 1, 3, 16, 33, 200]),
    shared=st.booleans(),
    keep=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 11.0]),
    spread=st.sampled_from([1.0, 30.0, 1000.0]),
)
def test_sums_are_those_of_all_exponentials(seed, m, shared, keep, temperature, spread):
    found, target = drawn(seed, 5, m, shared=shared, keep=keep, spread=spread)
    ours = log_sums(found, target, temperature)
    hit, whole = counted(found, target, temperature)
    torch.testing.assert_close(ours.hit_N.double(), hit, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.whole_N.double(), whole, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("nothing_before", [False, True])
def test_sums_are_added_to_those_of_another_memory(nothing_before):
    (one, target), (other, _) = drawn(1, 6, 9, keep=0.3), drawn(2, 6, 20, shared=True)
    before = LogSums(*(torch.full((6,), -math.inf) for _ in range(2))) if nothing_before else log_sums(one, target, 2.0)
    kept = before.hit_N.clone()
    ours, theirs = log_sums(other, target, 2.0, before), log_sums(other, target, 2.0).plus(before)
    torch.testing.assert_close((ours.hit_N, ours.whole_N), (theirs.hit_N, theirs.whole_N))
    assert torch.equal(before.hit_N, kept), "what is added to must stay"


def test_one_permission_for_all_stands_for_a_mask_of_them():
    found, target = drawn(3, 4, 7, keep=1.0)
    for keeps in (True, False):
        alike = Candidates(found.values_NM, found.scores_NM, torch.tensor([[keeps]]).expand(4, 7))
        mask = Candidates(found.values_NM, found.scores_NM, torch.full((4, 7), keeps))
        ours, theirs = log_sums(alike, target, 1.0), log_sums(mask, target, 1.0)
        assert torch.equal(ours.whole_N, theirs.whole_N)
        assert torch.equal(ours.hit_N, theirs.hit_N)
        assert bool(torch.isneginf(ours.whole_N).any()) != keeps


def test_what_is_not_kept_may_be_anything_and_what_is_kept_shows():
    scores = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.nan, 2.0], [1.0, -math.nan, 2.0]])
    keep = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    sums = log_sums(Candidates(torch.tensor([[4, 4, 4]]), scores, keep), torch.tensor([4, 4, 4]), 1.0)
    assert sums.whole_N[0] == pytest.approx(math.log(math.exp(1) + math.exp(2)), rel=1e-6)
    assert sums.whole_N.isnan().tolist() == [False, True, True]
    assert sums.hit_N.isnan().tolist() == [False, True, True]


def test_sums_with_a_gradient_have_one():
    found, target = drawn(4, 3, 5, keep=1.0)
    scores = found.scores_NM.requires_grad_()
    before = LogSums(torch.zeros(3), torch.zeros(3))
    log_sums(Candidates(found.values_NM, scores, found.keep_NM), target, 1.0, before).whole_N.sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad > 0).all())


def test_exp_is_exact_to_rounding():
    @numba.njit
    def exp_of(x_N, out_N):
        for n in range(len(x_N)):
            out_N[n] = exp(x_N[n])

    x_N = np.linspace(-86.9, 88.0, 20001, dtype=np.float32)
    out_N = np.empty_like(x_N)
    exp_of(x_N, out_N)
    np.testing.assert_allclose(out_N, np.exp(x_N.astype(np.float64)), rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_sums_of_rows_are_those_of_their_tokens(dtype, spread, threads):
    draw = np.random.default_rng(0)
    value_R, n, k = draw.integers(0, 5, 300).astype(dtype), 700, 200
    ids_NK, scores_NK = torch.from_numpy(draw.integers(-1, 300, (n, k))), torch.randn(n, k) * spread
    ids_NK[3] = -1
    scores_NK.masked_fill_(ids_NK < 0, -math.inf)
    target_N = torch.from_numpy(draw.integers(0, 5, n))
    collected = RowSums(value_R, target_N, 2.0)
    collected.add(0, Neighbors(ids_NK[:200], scores_NK[:200]))
    collected.add(200, Neighbors(ids_NK[200:500], scores_NK[200:500]))
    numbers = np.arange(n)[:499:-1].copy()
    collected.take(numbers, ids_NK.numpy()[numbers], scores_NK.numpy()[numbers])
    ours = collected.sums
    values_NK = torch.from_numpy(value_R.astype(np.int64))[ids_NK.clamp(min=0)]
    hit, whole = counted(Candidates(values_NK, scores_NK, ids_NK >= 0), target_N, 2.0)
    torch.testing.assert_close(ours.hit_N.double(), hit, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.whole_N.double(), whole, rtol=1e-6, atol=2e-6)

"""Sums in logarithms against float64, and that no bit of them depends on the company."""

import pytest
import torch

from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.combiners.joint import JointNormalization
from fairseq.memory.log_space import log_add
from fairseq.memory.types import Candidates, LogSums

# More than vectors of any processor hold; torch gives each thread at least 32,768 numbers.
SIZES = (1, 3, 12, 24, 40, 333)
COUNT = 700


def logs(seed: int, count: int = COUNT) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return -10.0 * torch.rand(count, generator=made)


def test_equals_float64():
    a, b = 8.0 * logs(0), 8.0 * logs(1)
    a[:2], b[1:3] = -torch.inf, -torch.inf
    truth = torch.logaddexp(a.double(), b.double())
    # Rounded are the difference (of up to 80, times a slope of at most 1/2), exp and log1p (each within two units and
    # at most log 2) and the sum.
    bound = 2.0**-24 * (0.5 * 80 + 8 * 0.7 + truth.abs())
    finite = truth.isfinite()
    assert ((log_add(a, b).double() - truth).abs() <= bound)[finite].all()
    assert torch.equal(log_add(a, b)[~finite].double(), truth[~finite])


def test_gradients_numerically_and_where_nothing_is_added():
    a, b = (logs(seed, 20).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(log_add, (a, b))
    some = torch.tensor([-torch.inf, -torch.inf, 1.0, 2.0], requires_grad=True)
    other = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0], requires_grad=True)
    log_add(some, other)[1:].sum().backward()
    assert some.grad.tolist() == [0.0, 0.0, 1.0, 0.5]
    assert other.grad.tolist() == [0.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_is_the_same_in_any_company(threads, size):
    a, b = logs(0, 70_001), logs(1, 70_001)
    parts = [log_add(x, y) for x, y in zip(a[:COUNT].split(size), b[:COUNT].split(size))]
    assert torch.equal(torch.cat(parts), log_add(a, b)[:COUNT])


def combiners():
    yield lambda lm, norm, found, target, near: Interpolation(0.3, 2.0)(lm, norm, found, target)
    yield JointNormalization(16, 2.0)
    yield JointNormalization(16, 2.0, weight=0.2, interpolation_temperature=3.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [7, 100])
def test_a_position_is_combined_alike_in_any_company(threads, size, k):
    """What a resumed evaluation and RetoMaton without pointers promise."""
    made = torch.Generator().manual_seed(2)
    values, keep = (torch.randint(0, high, (COUNT, k), generator=made) for high in (5, 9))
    found = Candidates(values, -9.0 * torch.rand(COUNT, k, generator=made), keep > 0)
    near, target = LogSums(logs(3), logs(4)), torch.randint(0, 5, (COUNT,), generator=made)
    for combine in combiners():
        whole = combine(logs(0), logs(1), found, target, near)
        for rows in torch.arange(COUNT).split(size)[:: max(1, 60 // size)]:
            part = Candidates(found.values_NM[rows], found.scores_NM[rows], found.keep_NM[rows])
            sums = LogSums(near.hit_N[rows], near.whole_N[rows])
            assert torch.equal(combine(logs(0)[rows], logs(1)[rows], part, target[rows], sums), whole[rows])

"""Loops that are written in the compiler's own instructions, against NumPy."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fairseq.memory.index.ops.kernels import approx_kth_largest, kth_largest
from fairseq.memory.index.ops.vector_kernels import count_reaching, finite_range

count = numba.njit(lambda numbers, least: count_reaching(numbers, least))
span = numba.njit(lambda numbers: finite_range(numbers))
kth = numba.njit(lambda numbers, k: approx_kth_largest(numbers, k))
exact_kth = numba.njit(lambda numbers, k: kth_largest(numbers, k))
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1000]


def numbers_of(size):
    draw = np.random.default_rng(size)
    numbers = draw.standard_normal(size).astype(np.float32)
    for value, share in ((np.nan, 0.1), (-np.inf, 0.2)):
        numbers[draw.random(size) < share] = value
    return numbers


@pytest.mark.parametrize("size", SIZES)
def test_the_range_is_that_of_numbers_that_are_neither_nan_nor_minus_infinity(size):
    numbers = numbers_of(size)
    finite = numbers[numbers > -np.inf]
    least, most, found = span(numbers)
    assert found == len(finite)
    assert (least, most) == ((finite.min(), finite.max()) if len(finite) else (np.inf, -np.inf))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("least", [-np.inf, -0.3, 0.0, 1.5, np.inf, np.nan])
def test_what_reaches_a_number_is_counted(size, least):
    numbers = numbers_of(size)
    assert count(numbers, np.float32(least)) == (numbers >= np.float32(least)).sum()


@pytest.mark.parametrize("size", SIZES[1:])
def test_at_least_k_reach_the_kth_largest_and_few_more(size):
    numbers = numbers_of(size)
    finite = np.sort(numbers[numbers > -np.inf])[::-1]
    for k in range(1, size + 1, max(1, size // 5)):
        found = kth(numbers, k)
        if len(finite) < k:
            assert found == -np.inf
            continue
        spread = finite[0] - finite[-1]
        assert finite[k - 1] - spread / 1000 <= found <= finite[k - 1]


def few_values(size, draw):
    return draw.integers(-3, 4, size).astype(np.float32)


def all_exponents(size, draw):
    return (draw.choice([-1.0, 1.0], size) * 10.0 ** draw.uniform(-44, 38.4, size)).astype(np.float32)


def with_infinities(size, draw):
    return draw.choice(np.array([np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 0.5, 1.0], np.float32), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [lambda size, _: numbers_of(size), few_values, all_exponents, with_infinities])
def test_k_reach_the_kth_largest_and_more_only_if_they_equal_it(size, make):
    numbers = make(size, np.random.default_rng(size))
    finite = np.sort(numbers[numbers > -np.inf])[::-1]
    for k in range(1, size + 1, max(1, size // 7)):
        found = exact_kth(numbers, k)
        if len(finite) < k:
            assert found == -np.inf
            continue
        reached = numbers[numbers >= found]
        assert len(reached) == k or (len(reached) > k and reached.min() == found == finite[k - 1])
        assert found <= finite[k - 1]

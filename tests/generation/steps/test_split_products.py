"""Products by parts of bfloat16 against those in float64; what they leave to others."""

import pytest
import torch

from fairseq.generation.steps import split_products
from fairseq.generation.steps.products import StepProducts
from fairseq.generation.steps.split_products import product

needs_amx = pytest.mark.skipif(not split_products.is_available(), reason="no AMX here")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _inputs(rows, width, types, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, 1, width), torch.randn(types, width), torch.randn(types)


@needs_amx
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(("width", "types"), [(32, 64), (96, 97), (352, 5), (64, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_float64(threads, rows, width, types, has_bias):
    x, weight, bias = _inputs(rows, width, types)
    found = product(x, weight, bias if has_bias else None)
    expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@needs_amx
@pytest.mark.parametrize("change", [lambda x: x, torch.abs, lambda x: x * 2.0**60])
def test_errors_are_no_larger_than_those_of_sums_in_float32(threads, change):
    x, weight, _ = (change(each) for each in _inputs(24, 768, 200))
    expected, of_float32 = x.double() @ weight.double().t(), torch.zeros(24, 1, 200)
    for d in range(768):  # one column after another, as a loop in float32 sums them up
        of_float32 += x[:, :, d, None] * weight[:, d]
    error = (product(x, weight, None) - expected).abs()
    assert error.max() <= (of_float32 - expected).abs().max()
    assert error.pow(2).mean() <= (of_float32 - expected).pow(2).mean()


@needs_amx
def test_numbers_that_are_all_alike_stay_within_the_bound_of_float32():
    """The parts that are left out, and the roundings, are all of one sign: the worst there is."""
    x, weight = (1 + each * 2.0**-20 for each in _inputs(24, 768, 200)[:2])
    expected = x.double() @ weight.double().t()
    assert ((product(x, weight, None) - expected).abs() <= 768 * 2.0**-24 * expected / 32).all()


@needs_amx
def test_parts_are_exact():
    """Rows that name one column each give back every bit of the matrix, whatever the size of its numbers."""
    torch.manual_seed(0)
    weight = torch.randn(40, 64) * 2.0 ** torch.randint(-90, 100, (40, 64))
    assert torch.equal(product(torch.eye(64), weight, None), weight.t())
    assert torch.equal(product(weight, torch.eye(64), None), weight)


@needs_amx
def test_threads_do_not_change_a_bit():
    x, weight, bias = _inputs(40, 128, 1000)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(product(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_amx
def test_a_number_that_is_not_finite_stays_in_its_products():
    x, weight, _ = _inputs(3, 32, 70)
    x[1, 0, 3], weight[68, 5] = torch.inf, torch.nan
    is_finite = product(x, weight, None)[:, 0].isfinite()
    assert not is_finite[1].any()
    assert not is_finite[:, 68].any()
    assert is_finite[::2, :68].all()


@needs_amx
def test_what_is_left_to_others():
    x, weight, _ = _inputs(4, 64, 128)
    assert product(x[..., :48].contiguous(), weight[:, :48].contiguous(), None) is None  # no whole registers
    assert product(x, torch.randn(64, 128).t(), None) is None  # rows that do not lie in one piece
    assert product(torch.randn(4097, 64), weight, None) is None  # so many that libraries are as fast


@needs_amx
def test_threads_without_a_team_are_left_to_others(threads, monkeypatch):
    monkeypatch.setattr(split_products, "openmp_team", lambda: (0, 1))
    x, weight, _ = _inputs(4, 64, 128)
    assert (product(x, weight, None) is None) == (threads > 1)


def test_without_the_instructions_matrices_are_packed(monkeypatch):
    monkeypatch.setattr(split_products, "is_available", lambda: False)
    x, weight, bias = _inputs(4, 64, 128)
    before, products = torch.get_num_threads(), StepProducts()
    try:
        torch.set_num_threads(1)
        assert split_products.product(x, weight, bias) is None
        torch.testing.assert_close(products(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)

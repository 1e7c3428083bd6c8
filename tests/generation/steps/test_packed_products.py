"""Products with packed matrices against those in float64; what they leave to torch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fairseq.generation.steps import packed_products
from fairseq.generation.steps.packed_products import PackedProducts
from fairseq.generation.steps.products import StepProducts
from fairseq.modules import inference_linear


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 31, 64])
@pytest.mark.parametrize(("width", "types"), [(8, 64), (200, 97), (193, 33), (385, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_float64(rows, width, types, has_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 1, width), torch.randn(types, width), torch.randn(types)
    found = PackedProducts()(x, weight, bias if has_bias else None)
    expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_matrix_that_changes_is_packed_again():
    x, products, layer = torch.randn(2, 4), PackedProducts(), nn.Linear(4, 6)
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer.weight, "data", torch.randn(6, 4)),
    ):
        with torch.no_grad():
            change()
            torch.testing.assert_close(products(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data.neg_(),
        lambda weight: weight.data.copy_(weight.data[torch.tensor([1, 0, *range(2, len(weight))])]),
        lambda weight: weight.detach().numpy().__setitem__((5, 3), 0.0),
    ],
)
def test_changes_that_torch_does_not_count_are_seen_when_a_search_begins(change):
    x, products, layer = torch.randn(2, 64), StepProducts(), nn.Linear(64, 3000)
    with torch.no_grad():
        products(x, layer.weight, layer.bias)
        change(layer.weight)
        products.begin()
        found = products(x, layer.weight, layer.bias)
        assert found is not None
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)


def test_digests_tell_matrices_of_equal_numbers_apart():
    torch.manual_seed(0)
    found = {packed_products.digest(torch.eye(64)[torch.randperm(64)]) for _ in range(500)}
    found |= {packed_products.digest(torch.ones(64, 64) * row[:, None]) for row in (torch.randn(500, 64) > 0) * 2.0 - 1}
    found |= {packed_products.digest(torch.zeros(4, 1024)), packed_products.digest(torch.zeros(1024, 4))}
    assert len(found) == 1002


def test_products_are_pickled_without_what_they_hold():
    x, layer, products = torch.randn(2, 64), nn.Linear(64, 100), StepProducts()
    products(x, layer.weight, layer.bias)
    function, given = products._packed.__reduce__()
    assert not function(*given)._packed
    pickle.dumps(products)
    found = copy.deepcopy(products)(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)


def test_the_default_type_does_not_matter():
    x, layer = torch.randn(2, 64), nn.Linear(64, 100)
    torch.set_default_dtype(torch.float64)
    try:
        found = StepProducts()(x, layer.weight, layer.bias)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_together_is_left_to_torch():
    weight, products = torch.randn(6, 32), StepProducts()
    assert products(torch.randn(2, 16), weight, None) is None
    for bias in (torch.randn(5), torch.randn(1), torch.randn(6).double()):
        assert products(torch.randn(2, 32), weight, bias) is None
    strided, x = torch.randn(12)[::2], torch.randn(2, 32)
    torch.testing.assert_close(products(x, weight, strided), x @ weight.t() + strided, rtol=1e-4, atol=1e-4)


def test_many_rows_and_what_exceeds_the_memory_are_left_to_torch(monkeypatch):
    weight, products = torch.randn(6, 4), PackedProducts()
    assert products(torch.randn(65, 4), weight, None) is None
    with torch.inference_mode():
        assert products(torch.randn(2, 4), weight.clone(), None) is None  # its changes are not counted
    monkeypatch.setattr(packed_products, "_MOST_BYTES", 150)
    assert products(torch.randn(2, 4), weight, None) is not None
    assert products(torch.randn(2, 4), weight.clone(), None) is None
    assert products(torch.randn(2, 4), weight, None) is not None
    del weight  # and its copy
    assert products(torch.randn(2, 4), torch.randn(6, 4), None) is not None


def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    x, weight, bias, found = torch.randn(40, 128), torch.randn(1000, 128), torch.randn(1000), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(PackedProducts()(x, weight, bias))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_a_team_of_threads_products_are_left_to_torch(monkeypatch, threads):
    monkeypatch.setattr(packed_products, "openmp_team", lambda: (0, 1))
    assert (PackedProducts()(torch.randn(2, 4), torch.randn(6, 4), None) is None) == (threads > 1)


def test_large_maps_are_multiplied_within_the_context_only():
    layer, seen = nn.Linear(64, 4100), []

    def product(x, weight, bias):
        seen.append(tuple(weight.shape))
        return None if len(x) > 2 else torch.full((len(x), 4100), 7.0)

    with torch.inference_mode():
        with inference_linear.multiplying_by(product):
            assert (inference_linear.linear(layer, torch.ones(2, 64)) == 7).all()
            torch.testing.assert_close(inference_linear.linear(layer, torch.ones(3, 64)), layer(torch.ones(3, 64)))
            inference_linear.linear(nn.Linear(4, 4), torch.ones(1, 4))  # a small one
        torch.testing.assert_close(inference_linear.linear(layer, torch.ones(1, 64)), layer(torch.ones(1, 64)))
    assert seen == [(4100, 64)] * 2

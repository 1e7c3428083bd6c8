"""The map for inference equals torch's own, and leaves to it what is not plain."""

import pytest
import torch
from torch import nn

from fairseq.modules import inference_linear


@pytest.mark.parametrize("rows", [(0,), (1,), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_map_equals_torchs(rows, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 4100, bias=bias), torch.randn(*rows, 64)
    assert layer.weight.numel() >= inference_linear._SMALLEST
    with torch.inference_mode():
        found = inference_linear.linear(layer, x)
    torch.testing.assert_close(found, (x.double() @ layer.weight.double().t() + (layer.bias if bias else 0)).float())


def test_gradients_hooks_and_other_types_are_torchs():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 4100), torch.randn(2, 64)
    assert torch.equal(inference_linear.linear(layer, x), layer(x))  # with gradients
    with torch.no_grad():
        assert torch.equal(inference_linear.linear(nn.Identity(), x), x)
        double = nn.Linear(64, 4100).double()
        assert torch.equal(inference_linear.linear(double, x.double()), double(x.double()))
        seen = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        inference_linear.linear(layer, x)
    assert seen == [1]

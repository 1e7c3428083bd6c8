"""A layer against its formula in pre- and post-norm order."""

import math

import pytest
import torch

from fairseq.modules.transformer_layer import ACTIVATION_FUNCTIONS, TransformerLayer


def make(normalize_before, activation="relu", **rates):
    torch.manual_seed(0)
    layer = TransformerLayer(8, 12, 2, activation=activation, normalize_before=normalize_before, **rates).double()
    layer.reset_parameters()
    for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
        torch.nn.init.normal_(norm.weight)
    return layer.eval()


def test_pre_norm_layer():
    layer, x = make(True), torch.randn(2, 4, 8, dtype=torch.double)
    out, tap = layer(x)
    middle = x + layer.self_attn(layer.self_attn_layer_norm(x), is_causal=True)
    read = layer.final_layer_norm(middle)
    torch.testing.assert_close(tap, read)
    torch.testing.assert_close(out, middle + layer.fc2(layer.fc1(read).clamp(min=0)))


def test_post_norm_layer():
    layer, x = make(False), torch.randn(2, 4, 8, dtype=torch.double)
    out, tap = layer(x)
    middle = layer.self_attn_layer_norm(x + layer.self_attn(x, is_causal=True))
    torch.testing.assert_close(tap, middle)
    torch.testing.assert_close(out, layer.final_layer_norm(middle + layer.fc2(layer.fc1(middle).clamp(min=0))))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_fast", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("gelu_accurate", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("tanh", math.tanh),
        ("linear", lambda x: x),
    ],
)
def test_activation_functions(name, formula):
    points = torch.linspace(-3, 3, 13, dtype=torch.double)
    expected = torch.tensor([formula(x.item()) for x in points], dtype=torch.double)
    torch.testing.assert_close(ACTIVATION_FUNCTIONS[name](points), expected)


def test_dropout_is_drawn_in_training_only():
    layer, x = make(True, dropout=0.5, activation_dropout=0.5), torch.randn(1, 4, 8, dtype=torch.double)
    torch.testing.assert_close(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])

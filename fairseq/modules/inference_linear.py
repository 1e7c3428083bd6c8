"""A linear map for inference on a CPU, by the library that is faster for few rows and a large matrix.

torch multiplies float32 by MKL, which takes longer than reading the matrix for the few rows of a decoding step. oneDNN,
which torch holds too, does not: 4 rows by 768 x 50,257 take 7.5 instead of 23.7 ms on two threads, 32 rows 17 instead
of 35. Shapes: N rows, D width, V width of the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST = 1 << 18  # weights of a matrix; below, calling oneDNN costs more than it saves


def is_plain_float32(x: Tensor, weight: Tensor) -> bool:
    """True where both are float32 on a CPU and stay so in products; spread weights (DTensor) have their own."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and on_cpu and x.dtype == weight.dtype == torch.float32


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; with gradients, of a layer with hooks and of one that is no linear one as torch computes it."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if torch.is_grad_enabled() or type(layer) is not nn.Linear or hooked:
        out: Tensor = layer(x)
        return out
    return product(x, layer.weight, layer.bias)


def product(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for the rows of x, (..., V)."""
    onednn = None if torch.is_grad_enabled() or weight_VD.numel() < _SMALLEST else _onednn_product()
    if onednn is None or not x.numel() or not is_plain_float32(x, weight_VD):
        return F.linear(x, weight_VD, bias_V)
    out: Tensor = onednn(x, weight_VD, bias_V, "none", [], "")
    return out


def _onednn_product() -> Any:
    """torch's call of oneDNN, made for its compiler; None in builds without it."""
    if not torch.backends.mkldnn.enabled:
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)

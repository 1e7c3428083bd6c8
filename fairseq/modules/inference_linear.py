"""A linear map for inference on a CPU, by the library that is faster for few rows and a large matrix.

torch multiplies float32 by MKL, which takes longer than reading the matrix for the few rows of a decoding step. oneDNN,
which torch holds too, does not: 4 rows by 768 x 50,257 take 7.5 instead of 23.7 ms on two threads, 32 rows 17 instead
of 35. Shapes: N rows, D width, V width of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST = 1 << 18  # weights of a matrix; below, calling oneDNN costs more than it saves


Product = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]
"""``x @ weight.T + bias`` of float32 on a CPU; None for what it leaves to torch."""
_faster: ContextVar[Product | None] = ContextVar("_faster", default=None)


@contextmanager
def multiplying_by(product: Product) -> Iterator[None]:
    """Within it, large matrices are multiplied by ``product``: a decoder packs those that it reads in each step.

    Of this thread only.
    """
    token = _faster.set(product)
    try:
        yield
    finally:
        _faster.reset(token)


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
    is_small = torch.is_grad_enabled() or weight_VD.numel() < _SMALLEST or not x.numel()
    if is_small or not is_plain_float32(x, weight_VD):
        return F.linear(x, weight_VD, bias_V)
    faster, onednn = _faster.get(), _onednn_product()
    out = None if faster is None else faster(x, weight_VD, bias_V)
    if out is None and onednn is not None:
        out = onednn(x, weight_VD, bias_V, "none", [], "")
    return F.linear(x, weight_VD, bias_V) if out is None else out


def _onednn_product() -> Any:
    """torch's call of oneDNN, made for its compiler; None in builds without it."""
    if not torch.backends.mkldnn.enabled:
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)

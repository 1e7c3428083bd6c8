"""The fastest products of a decoding step on this CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.generation.steps import split_products
from fairseq.generation.steps.packed_products import PackedProducts


class StepProducts:
    """Callable as ``inference_linear.multiplying_by`` takes it: by AMX, and otherwise with packed matrices."""

    def __init__(self) -> None:
        self._packed = PackedProducts()

    def begin(self) -> None:
        """To be called before the products of a search: weights may have changed since the one before."""
        self._packed.forget_changed()

    def __call__(self, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias``; None for what the libraries multiply as fast, and for what does not fit together."""
        wide, num_types = x.shape[-1] == weight_VD.shape[1], len(weight_VD)
        if not wide or not (bias_V is None or (bias_V.shape == (num_types,) and bias_V.dtype == torch.float32)):
            return None
        out = split_products.product(x, weight_VD, bias_V)
        return self._packed(x, weight_VD, bias_V) if out is None else out

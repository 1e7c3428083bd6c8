"""The fastest products of a decoding step on this CPU."""

from __future__ import annotations

from torch import Tensor

from fairseq.generation.steps import split_products
from fairseq.generation.steps.packed_products import PackedProducts


class StepProducts:
    """Callable as ``inference_linear.multiplying_by`` takes it: by AMX, and otherwise with packed matrices."""

    def __init__(self) -> None:
        self._packed = PackedProducts()

    def __call__(self, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias``; None for what the libraries multiply as fast."""
        out = split_products.product(x, weight_VD, bias_V)
        return self._packed(x, weight_VD, bias_V) if out is None else out

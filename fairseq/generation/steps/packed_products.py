"""Products of few rows with the matrices of a model, each packed at its first use (``packed_kernels.py``).

32 rows by 768 x 50,257 take 17 instead of 26 ms (oneDNN) on one thread with AVX-512, 8 rows 7 instead of 17; on two
threads of Zen 4 13.9 instead of 16.9, and 5.3 instead of 8.9.

Shapes: R rows, D width, V width of the result, K panels, X numbers of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.runtime.threads import openmp_team

_MOST_ROWS = 64  # with more, libraries reach as many products a second
_MOST_BYTES = 1 << 30  # of packed matrices; those of larger models are multiplied as they are
_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class _Packed:
    version: int
    """Changes of the matrix before it was packed."""
    address: int
    panel_KX: Tensor


class PackedProducts:
    """Callable as ``inference_linear.multiplying_by`` takes it."""

    def __init__(self) -> None:
        self._packed: Any = WeakTensorKeyDictionary()
        self._bytes = 0

    def __call__(self, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias``; None for what libraries multiply as fast, or what does not fit in memory."""
        from fairseq.generation.steps import packed_kernels

        (team, threads), has_many_rows = openmp_team(), x.numel() > _MOST_ROWS * x.shape[-1]
        is_alone = threads < torch.get_num_threads()  # where libraries have more threads
        if has_many_rows or is_alone or weight_VD.is_inference() or not packed_kernels.IS_FAST:
            return None
        panel_KX = self._panels(weight_VD)
        if panel_KX is None:
            return None
        row_RD, bias = x.reshape(-1, x.shape[-1]).contiguous(), _EMPTY if bias_V is None else bias_V
        out_RV = torch.empty(len(row_RD), len(weight_VD))
        row, panel, of_types, out = (each.detach().numpy() for each in (row_RD, panel_KX, bias, out_RV))
        packed_kernels.multiply(row, panel, of_types, out, team, threads)
        return out_RV.view(*x.shape[:-1], -1)

    def _panels(self, weight_VD: Tensor) -> Tensor | None:
        """The matrix, packed again where it has changed; None where it does not fit."""
        held: _Packed | None = self._packed.get(weight_VD)
        version, address = weight_VD._version, weight_VD.data_ptr()
        if held is None or (held.version, held.address) != (version, address):
            size = weight_VD.numel() * weight_VD.element_size()
            if held is None and self._bytes + size > _MOST_BYTES:
                return None
            self._bytes += size if held is None else 0
            held = _Packed(version, address, pack(weight_VD.detach()))
            self._packed[weight_VD] = held
        return held.panel_KX


def pack(weight_VD: Tensor) -> Tensor:
    """Panels of a matrix, as ``packed_kernels`` has them."""
    from fairseq.generation.steps.packed_kernels import PANEL

    (num_types, width), panels = weight_VD.shape, -(-len(weight_VD) // PANEL)
    panel_KX = torch.empty(panels, width * PANEL)
    whole = num_types // PANEL
    view = panel_KX.view(panels, width, PANEL)
    view[:whole].copy_(weight_VD[: whole * PANEL].view(whole, PANEL, width).transpose(1, 2))
    if whole < panels:
        view[whole].zero_()[:, : num_types - whole * PANEL].copy_(weight_VD[whole * PANEL :].t())
    return panel_KX

"""Products of few rows with the matrices of a model, each packed at its first use (``packed_kernels.py``).

32 rows by 768 x 50,257 take 17 instead of 26 ms (oneDNN) on one thread with AVX-512, 8 rows 7 instead of 17; on two
threads of Zen 4 13.9 instead of 16.9, and 5.3 instead of 8.9.

Shapes: R rows, D width, V width of the result, K panels, X numbers of a panel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.runtime.threads import map_in_threads, openmp_team

_MOST_ROWS = 64  # with more, libraries reach as many products a second
_MOST_BYTES = 1 << 30  # of packed matrices; those of larger models are multiplied as they are
_DIGEST_NUMBERS = 1 << 20  # of a matrix that one task reads
_EMPTY = torch.empty(0, dtype=torch.float32)


@dataclass(frozen=True)
class _Packed:
    version: int
    """Changes of the matrix before it was packed, of those that torch counts."""
    address: int
    digest: tuple[int, ...]
    panel_KX: Tensor


class PackedProducts:
    """Callable as ``inference_linear.multiplying_by`` takes it."""

    def __init__(self) -> None:
        self._packed: Any = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[PackedProducts], tuple[()]]:
        """What another process gets packs matrices of its own."""
        return PackedProducts, ()

    def forget_changed(self) -> None:
        """Forget matrices that have changed in whatever way: torch doesn't count what is done to ``weight.data``."""
        for weight_VD, held in list(self._packed.items()):
            if digest(weight_VD) != held.digest:
                del self._packed[weight_VD]

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
        row_RD, bias = x.reshape(-1, x.shape[-1]).contiguous(), _EMPTY if bias_V is None else bias_V.contiguous()
        out_RV = torch.empty(len(row_RD), len(weight_VD), dtype=torch.float32)
        row, panel, of_types, out = (each.detach().numpy() for each in (row_RD, panel_KX, bias, out_RV))
        packed_kernels.multiply(row, panel, of_types, out, team, threads)
        return out_RV.view(*x.shape[:-1], -1)

    def _panels(self, weight_VD: Tensor) -> Tensor | None:
        """The matrix, packed again where it has changed; None where it does not fit."""
        held: _Packed | None = self._packed.get(weight_VD)
        version, address = weight_VD._version, weight_VD.data_ptr()
        if held is None or (held.version, held.address) != (version, address):
            others = sum(other.panel_KX.nbytes for other in self._packed.values() if other is not held)
            if others + weight_VD.numel() * weight_VD.element_size() > _MOST_BYTES:
                return None
            held = _Packed(version, address, digest(weight_VD), pack(weight_VD.detach()))
            self._packed[weight_VD] = held
        return held.panel_KX


def digest(weight_VD: Tensor) -> tuple[int, ...]:
    """The shape of a float32 matrix, and numbers that are others, but by chance, when any bit of it is."""
    from fairseq.generation.steps.packed_kernels import mixed_sum

    bits_X = weight_VD.detach().reshape(-1).view(torch.int32).numpy().view("uint32")
    edges = [*range(0, len(bits_X), _DIGEST_NUMBERS), len(bits_X)]
    parts = [bits_X[first:past] for first, past in itertools.pairwise(edges)]
    return (*weight_VD.shape, *map_in_threads(lambda part_X: int(mixed_sum(part_X)), parts))


def pack(weight_VD: Tensor) -> Tensor:
    """Panels of a matrix, as ``packed_kernels`` has them."""
    from fairseq.generation.steps.packed_kernels import PANEL

    (num_types, width), panels = weight_VD.shape, -(-len(weight_VD) // PANEL)
    panel_KX = torch.empty(panels, width * PANEL, dtype=torch.float32)
    whole = num_types // PANEL
    view = panel_KX.view(panels, width, PANEL)
    view[:whole].copy_(weight_VD[: whole * PANEL].view(whole, PANEL, width).transpose(1, 2))
    if whole < panels:
        view[whole].zero_()[:, : num_types - whole * PANEL].copy_(weight_VD[whole * PANEL :].t())
    return panel_KX

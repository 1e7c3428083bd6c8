"""An order of vectors in which similar ones are near each other.

Shapes: N vectors, D width, S of them that are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEEN, _STEPS = 512, 8


def nearby_order(rows_ND: Tensor, num_parts: int) -> Tensor:
    """Numbers of float32 vectors, int64 (N), in an order of which each of ``num_parts`` equal parts holds similar ones.

    They are halved again and again, each part along the direction in which it varies most.
    """
    parts = [torch.arange(len(rows_ND))]
    while len(parts) < min(num_parts, len(rows_ND)):
        parts = [half for part in parts for half in _halves(rows_ND, part)]
    return torch.cat(parts)


def _halves(rows_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor]:
    own_ND = rows_ND[part_N]
    order = (own_ND @ _main_direction(own_ND)).argsort(stable=True)
    return part_N[order[: len(order) // 2]], part_N[order[len(order) // 2 :]]


def _main_direction(rows_ND: Tensor) -> Tensor:
    """About the first principal component, by power iteration."""
    seen_SD = rows_ND[:: max(1, len(rows_ND) // _SEEN)]
    seen_SD = seen_SD - seen_SD.mean(0)
    direction_D = seen_SD[0] if len(seen_SD) else seen_SD.new_zeros(seen_SD.shape[1])
    for _ in range(_STEPS):
        direction_D = torch.nn.functional.normalize(seen_SD.T @ (seen_SD @ direction_D), dim=0)
    return direction_D

"""Parts of similarities: rows of length one for the cosine, TRIME's scaled products, distances as products."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.memory.types import Metric


def normalized(rows: Tensor) -> Tensor:
    """Rows scaled to length one; a row of zeros stays."""
    return torch.nn.functional.normalize(rows, dim=-1)


def scaled_products(query_ND: Tensor, key_MD: Tensor) -> Tensor:
    """TRIME's similarity before any temperature: inner product over the root of the width, (N, M) float32.

    Source: arXiv 2205.12674, sec. 3.2.
    """
    # Scaled first: half precision would overflow in the products of long keys.
    scaled_ND = query_ND.float() * query_ND.shape[1] ** -0.5
    scores_NM: Tensor = (scaled_ND.to(query_ND.dtype) @ key_MD.T).float()
    return scores_NM


def lifted(rows_ND: Tensor, center_D: Tensor, radius: Tensor) -> Tensor:
    """Rows two columns wider whose product with a :func:`conjugate` row is minus the squared distance, (N, D + 2).

    ``-|x - y|^2 = 2 x.y - |x|^2 - |y|^2``, and ``|x|^2 + |y|^2`` is ``u(x) u(y) - v(x) v(y)`` with ``u = (|x|^2 / r +
    r) / sqrt(2)`` and ``v = (|x|^2 / r - r) / sqrt(2)``. So the similarity is as symmetric as the inner product is.

    Args:
        center_D: subtracted first, which changes no distance but keeps the terms small, and so exact.
        radius: r; best the root of the mean squared length of the centred rows.
    """
    centered_ND = rows_ND - center_D
    length_N1 = centered_ND.square().sum(1, keepdim=True) / radius
    columns = (2**0.5 * centered_ND, (length_N1 - radius) * 0.5**0.5, (length_N1 + radius) * 0.5**0.5)
    return torch.cat(columns, dim=1)


def conjugate(rows_ND: Tensor, metric: Metric) -> Tensor:
    """The other factor of a similarity's product: the rows themselves, or for L2 the last column negated."""
    if metric == Metric.IP:
        return rows_ND
    return torch.cat([rows_ND[:, :-1], -rows_ND[:, -1:]], dim=1)

"""Parts of similarities: rows of length one for the cosine, and TRIME's scaled products."""

from __future__ import annotations

import torch
from torch import Tensor


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

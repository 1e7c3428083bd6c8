"""Similarity of queries and some rows of a store, computed from the full keys in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.memory.files import Array
from fairseq.memory.rows import as_tensor
from fairseq.memory.types import Metric

_CHUNK_BYTES = 2 << 20  # of gathered keys: small enough to stay in the processor's cache between the passes


def normalized(rows: Tensor) -> Tensor:
    """Rows scaled to length one; a row of zeros stays."""
    return torch.nn.functional.normalize(rows, dim=-1)


def pair_scores(metric: Metric, query_ND: Tensor, keys: Array, ids_NK: Tensor) -> Tensor:
    """Similarity of each query with its own K rows of ``keys``, (N, K) float32; -inf where the id is -1."""
    query_ND = query_ND.detach().float().cpu()
    keys_MD = as_tensor(keys)
    missing_NK = ids_NK < 0
    scores_NK = torch.empty(ids_NK.shape, dtype=torch.float32)
    rows = max(1, _CHUNK_BYTES // max(1, 4 * ids_NK.shape[1] * query_ND.shape[1]))
    for start in range(0, len(query_ND), rows):
        part = slice(start, start + rows)
        ids = ids_NK[part].clamp_min(0)
        found_NKD = keys_MD.index_select(0, ids.reshape(-1)).float().view(*ids.shape, -1)
        scores_NK[part] = _scores(metric, query_ND[part, None], found_NKD)
    return scores_NK.masked_fill_(missing_NK, -torch.inf)


def _scores(metric: Metric, query_N1D: Tensor, found_NKD: Tensor) -> Tensor:
    if metric is Metric.L2:
        return found_NKD.sub_(query_N1D).square_().sum(-1).neg_()
    if metric is Metric.COS:
        found_NKD, query_N1D = normalized(found_NKD), normalized(query_N1D)
    scores_NK: Tensor = torch.linalg.vecdot(found_NKD, query_N1D)
    return scores_NK


def scaled_products(query_ND: Tensor, key_MD: Tensor) -> Tensor:
    """TRIME's similarity before any temperature: inner product over the root of the width, (N, M) float32.

    Source: arXiv 2205.12674, sec. 3.2.
    """
    # Scaled first: half precision would overflow in the products of long keys.
    scaled_ND = query_ND.float() * query_ND.shape[1] ** -0.5
    scores_NM: Tensor = (scaled_ND.to(query_ND.dtype) @ key_MD.T).float()
    return scores_NM

"""Exact search over the keys themselves: no index file, and the oracle that other indexes are measured by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore import as_tensor
from fairseq.memory.files import Array
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.similarity import normalized, pair_scores
from fairseq.memory.types import Metric, Neighbors

_BLOCK_BYTES = 32 << 20  # of scores held at once; a block of keys is at most as large


class ExactIndex:
    """Streams the (memory-mapped) keys once for each group of queries, in float32."""

    def __init__(self, keys: Array, metric: Metric = Metric.L2) -> None:
        """Args.

        keys: (rows, dim), any floating type; read as they are needed.
        """
        self.keys = keys
        self.metric = metric

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return int(self.keys.shape[1])

    def __len__(self) -> int:
        return len(self.keys)

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query, best first; of equally close ones the lower row."""
        check_k(k, len(self))
        check_queries(query_ND, self.dim)
        query_ND = query_ND.detach().float().cpu()
        query_ND = normalized(query_ND) if self.metric is Metric.COS else query_ND
        parts = [self._search(part, k) for part in torch.split(query_ND, 4096)] or [self._search(query_ND, k)]
        return Neighbors(torch.cat([p.ids_NK for p in parts]), torch.cat([p.scores_NK for p in parts]))

    def _search(self, query_ND: Tensor, k: int) -> Neighbors:
        best_NK = query_ND.new_empty((len(query_ND), 0))
        ids_NK = torch.empty((len(query_ND), 0), dtype=torch.int64)
        rows = max(1, _BLOCK_BYTES // (4 * max(len(query_ND), self.dim)))
        for start in range(0, len(self), rows):
            block_MD = as_tensor(np.ascontiguousarray(self.keys[start : start + rows])).float()
            scores_NM = self._block_scores(query_ND, block_MD)
            block_NK, at_NK = scores_NM.topk(min(k, scores_NM.shape[1]), dim=1)
            best_NK = torch.cat([best_NK, block_NK], 1)
            ids_NK = torch.cat([ids_NK, at_NK + start], 1)
            best_NK, keep_NK = best_NK.topk(min(k, best_NK.shape[1]), dim=1)
            ids_NK = ids_NK.gather(1, keep_NK)
        # The matrix product rounds differences away that a sum of squared differences keeps.
        scores_NK = pair_scores(self.metric, query_ND, self.keys, ids_NK)
        return sorted_neighbors(ids_NK, scores_NK)

    def _block_scores(self, query_ND: Tensor, block_MD: Tensor) -> Tensor:
        if self.metric is Metric.L2:
            return torch.addmm(-block_MD.square().sum(1), query_ND, block_MD.T, alpha=2.0)
        return query_ND @ (normalized(block_MD) if self.metric is Metric.COS else block_MD).T


def sorted_neighbors(ids_NK: Tensor, scores_NK: Tensor) -> Neighbors:
    """Order neighbours best first, equally good ones by their row."""
    by_id_NK = ids_NK.argsort(dim=1)
    scores_NK, ids_NK = scores_NK.gather(1, by_id_NK), ids_NK.gather(1, by_id_NK)
    order_NK = scores_NK.argsort(dim=1, descending=True, stable=True)
    return Neighbors(ids_NK.gather(1, order_NK), scores_NK.gather(1, order_NK))

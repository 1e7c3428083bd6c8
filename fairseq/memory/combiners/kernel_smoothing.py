"""KSTER: a kernel whose bandwidth is learned, and a learned mixing weight.

Shapes: N positions, K neighbours, D width of the keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairseq.memory.combiners.learned import ShareNetwork, Shares
from fairseq.memory.scoring import masked_logsumexp
from fairseq.memory.types import Candidates


class KernelSmoothing(ShareNetwork):
    """``p = (1 - lambda) p_model + lambda p_kernel`` with a Gaussian kernel: a softmax of score / bandwidth.

    The bandwidth is ``exp(W_1 [q; mean of the keys] + b_1)``, lambda is
    ``sigmoid(W_3 relu(W_2 [q; kernel-weighted mean of the keys] + b_2) + b_3)``; q is the query. Before training the
    bandwidth is the temperature everywhere.

    Source: arXiv 2109.09991, sec. 3.
    """

    needs = frozenset({"query_ND", "key_NMD"})

    def __init__(self, k: int, temperature: float, dim: int, hidden: int = 32, dropout: float = 0.2) -> None:
        """Args.

        dim: width of the keys.
        hidden: width of the inner layer behind lambda.
        dropout: share of that layer that is dropped in training.
        Raises: ValueError when a value is out of range.
        """
        super().__init__(k, temperature)
        self.log_bandwidth = nn.Linear(2 * dim, 1)
        nn.init.zeros_(self.log_bandwidth.weight)
        nn.init.constant_(self.log_bandwidth.bias, math.log(temperature))
        self.mixing = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def shares(self, found: Candidates) -> Shares:
        """See ``ShareNetwork``."""
        facts = found.facts
        assert facts is not None, "it reads keys"
        assert facts.query_ND is not None, "it reads the query"
        assert facts.key_NMD is not None, "it reads keys"
        query_ND, key_NKD = (x.to(found.scores_NM.dtype) for x in (facts.query_ND, facts.key_NMD))
        count_N1 = found.keep_NM.sum(1, keepdim=True).clamp_min(1)
        even_NK = found.keep_NM.to(key_NKD.dtype) / count_N1
        log_width_N1 = self.log_bandwidth(torch.cat([query_ND, _mean(even_NK, key_NKD)], 1))
        scores_NK = found.scores_NM.masked_fill(~found.keep_NM, 0.0) * torch.exp(-log_width_N1)
        norm_N = masked_logsumexp(scores_NK, found.keep_NM)
        norm_N1 = norm_N.masked_fill(torch.isneginf(norm_N), 0.0)[:, None]
        log_kernel_NK = (scores_NK - norm_N1).masked_fill(~found.keep_NM, -torch.inf)
        odds_N1 = self.mixing(torch.cat([query_ND, _mean(log_kernel_NK.exp(), key_NKD)], 1))
        log_memory_N1 = nn.functional.logsigmoid(odds_N1)
        return Shares(log_kernel_NK + log_memory_N1, nn.functional.logsigmoid(-odds_N1)[:, 0])


def _mean(weight_NK: Tensor, key_NKD: Tensor) -> Tensor:
    return torch.einsum("nk,nkd->nd", weight_NK, key_NKD)

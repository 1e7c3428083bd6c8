"""SK-MT's combiner: the nearer the nearest neighbour, the more the neighbours count.

Shapes: N positions, K neighbours.
"""

from __future__ import annotations

import torch

from fairseq.memory.combiners.learned import ShareNetwork, Shares
from fairseq.memory.scoring import masked_logsumexp
from fairseq.memory.types import Candidates


class NearestDistance(ShareNetwork):
    """``p = (1 - lambda) p_model + lambda p_memory``, ``lambda = max(0, 1 - d_1 / T)``; d_1 is the nearest's distance.

    p_memory is a softmax of ``-d / T``. Nothing is trained.

    Source: arXiv 2302.12188, sec. 3.2.
    """

    def shares(self, found: Candidates) -> Shares:
        """See ``ShareNetwork``; scores must be minus squared distances."""
        scaled_NK = found.scores_NM / self.temperature
        nearest_N = scaled_NK.masked_fill(~found.keep_NM, -torch.inf).amax(1)  # minus d_1 / T
        weight_N = (1.0 + nearest_N).clamp(0.0, 1.0)
        norm_N = masked_logsumexp(scaled_NK, found.keep_NM)
        log_memory_NK = scaled_NK - norm_N.masked_fill(torch.isneginf(norm_N), 0.0)[:, None]
        log_share_NK = (log_memory_NK + weight_N.log()[:, None]).masked_fill(~found.keep_NM, -torch.inf)
        return Shares(log_share_NK, torch.log1p(-weight_N))

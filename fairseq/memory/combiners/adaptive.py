"""Adaptive kNN-MT: a network chooses how many of the nearest neighbours count, and how much.

Shapes: N positions, K neighbours, R choices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq.memory.combiners.learned import ShareNetwork, Shares, Standardized, distances, distinct_counts
from fairseq.memory.scoring import masked_logsumexp
from fairseq.memory.types import Candidates


class MetaK(ShareNetwork):
    """The meta-k network: ``p = w_0 p_model + sum_r w_r p_r``, r over the powers of two up to k.

    p_r is the softmax of score / temperature over the nearest r neighbours, summed per token; the weights w are a
    softmax of two layers that read the distances, and the number of different tokens among the nearest 1, 2, ... k.
    The paper's distances are not scaled before the first layer; here they are, which changes what training starts
    from and not what the network can compute.

    Source: arXiv 2105.13022, sec. 3.

    ```python
    network = MetaK(k=8, temperature=10.0)
    network.choices  # (0, 1, 2, 4, 8)
    ```
    """

    def __init__(self, k: int, temperature: float, dim: int = 0, hidden: int = 32, dropout: float = 0.2) -> None:
        """Args.

        dim: width of the keys, which this network does not read.
        hidden: width of its inner layer.
        dropout: share of that layer that is dropped in training.
        Raises: ValueError when a value is out of range.
        """
        super().__init__(k, temperature)
        self.choices = (0, *(1 << bit for bit in range(k.bit_length())))
        self.inputs = Standardized(2 * k)
        self.layers = nn.Sequential(
            nn.Linear(2 * k, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, len(self.choices))
        )

    def fit_inputs(self, found: Candidates) -> None:
        """See ``ShareNetwork``."""
        self.inputs.fit(self._features(found))

    def _features(self, found: Candidates) -> Tensor:
        return torch.cat([distances(found), distinct_counts(found)], 1)

    def log_weights(self, found: Candidates) -> Tensor:
        """Log of the weight of each choice, (N, R); a choice without a neighbour that may be used gets none."""
        scores_NR = self.layers(self.inputs(self._features(found)))
        sizes = [size - 1 for size in self.choices[1:]]
        open_NR = torch.cat([torch.ones_like(found.keep_NM[:, :1]), found.keep_NM.cummax(1).values[:, sizes]], 1)
        return torch.log_softmax(scores_NR.masked_fill(~open_NR, -torch.inf), 1)

    def shares(self, found: Candidates) -> Shares:
        """See ``ShareNetwork``."""
        log_w_NR = self.log_weights(found)
        scaled_NK = found.scores_NM / self.temperature
        place_K = torch.arange(self.k, device=scaled_NK.device)
        size_R = torch.tensor(self.choices[1:], device=scaled_NK.device)
        used_NRK = (place_K < size_R[:, None]) & found.keep_NM[:, None]
        scaled_NRK = scaled_NK[:, None].expand_as(used_NRK)
        norm_NR = masked_logsumexp(scaled_NRK.flatten(0, 1), used_NRK.flatten(0, 1)).view(used_NRK.shape[:2])
        offset_NR = torch.where(used_NRK.any(2), log_w_NR[:, 1:] - norm_NR, -torch.inf)
        each_NRK = torch.where(used_NRK, scaled_NRK, 0.0) + offset_NR[:, :, None]
        by_neighbor = each_NRK.transpose(1, 2).flatten(0, 1), used_NRK.transpose(1, 2).flatten(0, 1)
        return Shares(masked_logsumexp(*by_neighbor).view_as(scaled_NK), log_w_NR[:, 0])

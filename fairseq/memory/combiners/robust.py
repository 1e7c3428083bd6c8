"""Robust kNN-MT: neighbours count as the model believes their tokens, and the memory as the model is unsure.

Shapes: N positions, K neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairseq.memory.combiners.learned import ShareNetwork, Shares, Standardized, distances, distinct_counts
from fairseq.memory.scoring import masked_logsumexp
from fairseq.memory.types import Candidates


class ConfidenceWeights(ShareNetwork):
    """``p = (1 - lambda) p_model + lambda p_memory`` with the model's confidence in both parts.

    p_memory is a softmax of ``score / T + c``. c is read from ln p of the neighbour's token, by the model at the
    position and by the model where the neighbour was stored; T from the distances and the numbers of different tokens;
    ``lambda = exp(s_memory) / (exp(s_memory) + exp(s_model))`` with s_memory from the same and s_model from the model's
    largest log-probabilities and those of the neighbours' tokens. Each is two layers with tanh between. The paper also
    perturbs the neighbours in training; that is not done here.

    Source: arXiv 2210.08808, sec. 3.
    """

    needs = frozenset({"stored_logp_NM", "model_logp_NM", "top_logp_NM"})

    def __init__(self, k: int, temperature: float, dim: int = 0, hidden: int = 32, dropout: float = 0.2) -> None:
        """Args.

        dim: width of the keys, which this network does not read.
        hidden: width of its inner layers.
        dropout: share of the layers behind lambda that is dropped in training.
        Raises: ValueError when a value is out of range.
        """
        super().__init__(k, temperature)
        self.memory_inputs, self.model_inputs = Standardized(2 * k), Standardized(2 * k)
        self.confidence = _two_layers(2, hidden, 0.0)
        self.log_temperature = _two_layers(2 * k, hidden, 0.0)
        self.memory_score = _two_layers(2 * k, hidden, dropout)
        self.model_score = _two_layers(2 * k, hidden, dropout)
        for last in (self.confidence[-1], self.log_temperature[-1]):  # at first a softmax at the given temperature
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def fit_inputs(self, found: Candidates) -> None:
        """See ``ShareNetwork``."""
        self.memory_inputs.fit(_of_memory(found))
        self.model_inputs.fit(_of_model(found))

    def shares(self, found: Candidates) -> Shares:
        """See ``ShareNetwork``."""
        of_memory_NF = self.memory_inputs(_of_memory(found))
        log_T_N1 = self.log_temperature(of_memory_NF) + math.log(self.temperature)
        believed_NK2 = torch.stack([_fact(found, "model_logp_NM"), _fact(found, "stored_logp_NM")], 2)
        scores_NK = found.scores_NM.masked_fill(~found.keep_NM, 0.0) * torch.exp(-log_T_N1)
        scores_NK = scores_NK + self.confidence(believed_NK2)[:, :, 0]
        norm_N = masked_logsumexp(scores_NK, found.keep_NM)
        log_memory_NK = scores_NK - norm_N.masked_fill(torch.isneginf(norm_N), 0.0)[:, None]
        odds_N1 = self.memory_score(of_memory_NF) - self.model_score(self.model_inputs(_of_model(found)))
        log_share_NK = (log_memory_NK + nn.functional.logsigmoid(odds_N1)).masked_fill(~found.keep_NM, -torch.inf)
        return Shares(log_share_NK, nn.functional.logsigmoid(-odds_N1)[:, 0])


def _two_layers(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 1))


def _of_memory(found: Candidates) -> Tensor:
    return torch.cat([distances(found), distinct_counts(found)], 1)


def _of_model(found: Candidates) -> Tensor:
    return torch.cat([_fact(found, "top_logp_NM"), _fact(found, "model_logp_NM")], 1)


def _fact(found: Candidates, name: str) -> Tensor:
    """Log-probabilities, 0 where no neighbour is; at most 50 below 0, which is as good as impossible."""
    fact_NK = getattr(found.facts, name, None)
    assert isinstance(fact_NK, Tensor), f"the model's probabilities are missing: {name}"
    kept_NK = fact_NK.to(found.scores_NM.dtype).clamp_min(-50.0)
    return kept_NK if name == "top_logp_NM" else kept_NK.masked_fill(~found.keep_NM, 0.0)

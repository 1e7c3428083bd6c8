"""Combiners without parameters that are learned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fairseq.memory.scoring import check_temperature, check_weight, interpolate, knn_logp
from fairseq.memory.types import Candidates, LogSums


@dataclass(frozen=True)
class Interpolation:
    """``log((1 - weight) p_lm + weight p_knn)`` (kNN-LM, arXiv 1911.00172)."""

    weight: float
    """Share of the neighbours, 0 to 1."""
    temperature: float = 1.0
    """Divides the similarities."""

    def __post_init__(self) -> None:
        check_weight(self.weight, "--lmbda")
        check_temperature(self.temperature)

    def __call__(
        self, lm_logp_N: Tensor, norm_N: Tensor, found: Candidates, target_N: Tensor, near: LogSums | None = None
    ) -> Tensor:
        """Log-probability of each target, (N,). ``norm_N`` belongs to the interface; interpolation needs none."""
        assert near is None, "interpolation takes no memories of the text"
        return interpolate(lm_logp_N, knn_logp(found, target_N, self.temperature), self.weight)

"""Interpolation of the model's distribution with that of the neighbours (kNN-LM)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fairseq.memory.scoring import check_temperature, check_weight, interpolate, knn_logp
from fairseq.memory.types import Candidates, LogSums


@dataclass(frozen=True)
class Interpolation:
    """``log((1 - weight) p_lm + weight p_knn)``: the combiner of kNN-LM.

    p_knn is a softmax of score / temperature over the candidates, summed per token.

    Raises: ValueError when a field is out of range.
    Source: arXiv 1911.00172, eq. 3.

    ```python
    combine = Interpolation(weight=0.25, temperature=10.0)
    combine(lm_logp_N, lm_norm_N, memory.lookup(query_ND), target_N)  # log-probabilities, (N,)
    ```
    """

    weight: float
    """Share of the neighbours, 0 to 1."""
    temperature: float = 1.0
    """Divides the similarities."""

    def __post_init__(self) -> None:
        check_weight(self.weight, "--lmbda")
        check_temperature(self.temperature)

    def __call__(
        self,
        lm_logp_N: Tensor,
        norm_N: Tensor,
        candidates: Candidates | None,
        target_N: Tensor,
        text_sums: LogSums | None = None,
    ) -> Tensor:
        """Log-probability of each target, (N,). ``norm_N`` belongs to the interface; interpolation needs none."""
        assert text_sums is None, "interpolation takes no memories of the text"
        assert candidates is not None, "there is nothing to interpolate with"
        return interpolate(lm_logp_N, knn_logp(candidates, target_N, self.temperature), self.weight)

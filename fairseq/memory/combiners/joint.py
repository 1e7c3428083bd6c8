"""Joint normalisation over the vocabulary and every memory, and the external memory mixed in on top (TRIME)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.memory.log_space import log_add
from fairseq.memory.scoring import check_temperature, check_weight, interpolate, joint_logp_of_sums, knn_logp
from fairseq.memory.sources.log_sums import log_sums
from fairseq.memory.types import Candidates, LogSums


@dataclass(frozen=True)
class JointNormalization:
    """One normalisation over the vocabulary and every memory, then optional interpolation: the combiner of TRIME.

    Joint scores are inner products divided by the root of the width; the interpolated ones are plain inner products, as
    in kNN-LM.

    Raises: ValueError when a field is out of range.
    Source: arXiv 2205.12674, sec. 3.

    ```python
    combine = JointNormalization(dim=16)
    external = ExternalMemory.open("store", k=8, metric="ip")
    combine(lm_logp_N, lm_norm_N, external.lookup(query_ND), target_N)  # log-probabilities, (N,)
    ```
    """

    dim: int
    """Width of the keys."""
    temperature: float = 1.0
    """Divides the similarities in the joint normalisation."""
    with_external: bool = True
    """The external memory takes part in the joint normalisation."""
    weight: float = 0.0
    """Share of the external memory's own distribution, 0 to 1; 0 leaves the joint normalisation alone."""
    interpolation_temperature: float = 1.0
    """Divides the similarities in that distribution."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_temperature(self.interpolation_temperature)
        check_weight(self.weight, "--lmbda")

    def __call__(
        self,
        lm_logp_N: Tensor,
        norm_N: Tensor,
        candidates: Candidates | None,
        target_N: Tensor,
        text_sums: LogSums | None = None,
    ) -> Tensor:
        """Log-probability of each target, (N,).

        Args:
            candidates: tokens that the external memory offers, scored by inner product; None without one.
            text_sums: what the memories of the text add, at the joint temperature; None without any.
        """
        logp_N = self.joint(lm_logp_N, norm_N, candidates, target_N, text_sums)
        if candidates is None or self.weight == 0.0:
            return logp_N
        memory_logp_N = knn_logp(candidates, target_N, self.interpolation_temperature)
        return mixed_where_found(logp_N, memory_logp_N, candidates.keep_NM.any(1), self.weight)

    def joint(
        self,
        lm_logp_N: Tensor,
        norm_N: Tensor,
        candidates: Candidates | None,
        target_N: Tensor,
        text_sums: LogSums | None,
    ) -> Tensor:
        """The joint normalisation alone, (N,); arguments as in a call."""
        sums = text_sums
        if candidates is not None and self.with_external:
            # The root of the width goes with the temperature: the scores stay as they are for the interpolation.
            sums = log_sums(candidates, target_N, self.temperature * self.dim**0.5).plus(text_sums)
        return lm_logp_N if sums is None else joint_logp_of_sums(lm_logp_N, norm_N, sums)


def mixed_where_found(logp_N: Tensor, memory_logp_N: Tensor, found_N: Tensor, weight: float) -> Tensor:
    """A memory's own distribution mixed in, (N,), but where it found nothing: there is no distribution then."""
    return torch.where(found_N, interpolate(logp_N, memory_logp_N, weight), logp_N)


@dataclass(frozen=True)
class WholeMemoryAdded:
    """What TRIME's translation program computes: ``(1 - share) p_lm + p_memory``, which sums to more than 1.

    The share is the memory's part of vocabulary and memory normalised together, and is left out of the second term.
    For comparison with that program only: ``JointNormalization`` is the distribution that TRIME trains.
    """

    dim: int
    """Width of the keys."""
    temperature: float = 1.0
    """Divides the similarities."""

    def __call__(
        self,
        lm_logp_N: Tensor,
        norm_N: Tensor,
        candidates: Candidates | None,
        target_N: Tensor,
        text_sums: LogSums | None = None,
    ) -> Tensor:
        """Log of each target's sum, (N,)."""
        assert text_sums is None, "there are no memories of the text in translation"
        assert candidates is not None, "there is nothing to add"
        scale = self.temperature * self.dim**0.5
        sums = log_sums(candidates, target_N, scale)
        log_left_N = torch.nn.functional.logsigmoid(norm_N - sums.whole_N)
        return log_add(lm_logp_N + log_left_N, knn_logp(candidates, target_N, scale))

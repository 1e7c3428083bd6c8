"""The interface of combiners. Shapes: N scored positions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fairseq.memory.types import Candidates, LogSums


class Combiner(Protocol):
    """Turns the model's scores and a memory's candidates into one log-probability."""

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
            lm_logp_N: ln p of each target by the language model.
            norm_N: log-sum of the model's vocabulary scores.
            candidates: tokens that the external memory offers; None without one.
            text_sums: what the memories of the text add; None without any.
        """
        ...

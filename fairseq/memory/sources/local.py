"""The local memory: what the model has read of its own input.

Shapes: N scored positions, T positions of the input.
"""

from __future__ import annotations

import torch

from fairseq.memory.similarity import scaled_products
from fairseq.memory.types import Candidates, Passage


class LocalMemory:
    """Local memory: each scored position is offered the positions before it in the same input, context included.

    Scores are inner products divided by the root of the width.

    Source: arXiv 2205.12674, sec. 3.1.

    ```python
    candidates = LocalMemory().lookup(passage)
    candidates.keep_NM.sum(1)  # tensor([2, 3, 4, 5, 6, 7]): the context, and what was scored before
    ```
    """

    def __init__(self) -> None:
        self._keep_NT = torch.empty(0, 0, dtype=torch.bool)
        self._num_context = 0

    def lookup(self, passage: Passage) -> Candidates:
        """Candidates for the scored positions of a passage; none sees itself or a later one."""
        scores_NT = scaled_products(passage.queries, passage.key_TD)
        return Candidates(passage.value_T[None], scores_NT, self._past(scores_NT, passage.num_context))

    def _past(self, scores_NT: torch.Tensor, num_context: int) -> torch.Tensor:
        """Visibility mask of the passages; most are of one shape, so the last mask is cached."""
        kept = self._keep_NT
        if kept.shape != scores_NT.shape or kept.device != scores_NT.device or self._num_context != num_context:
            kept = torch.ones_like(scores_NT, dtype=torch.bool).tril_(num_context - 1)
            self._keep_NT, self._num_context = kept, num_context
        return kept

    def append(self, passage: Passage) -> None:
        """Does nothing: the next input brings its own context."""

    def reset(self) -> None:
        """Does nothing."""

"""The local memory: what the model has read of its own input.

Shapes: N scored positions, T positions of the input.
"""

from __future__ import annotations

import torch

from fairseq.memory.similarity import scaled_products
from fairseq.memory.types import Candidates, Passage


class LocalMemory:
    """Offers each scored position the positions before it in the same input, context included.

    Source: arXiv 2205.12674, sec. 3.1.
    """

    def lookup(self, passage: Passage) -> Candidates:
        """See ``TextSource``."""
        scores_NT = scaled_products(passage.queries, passage.key_TD)
        keep_NT = torch.ones_like(scores_NT, dtype=torch.bool).tril_(passage.num_context - 1)
        return Candidates(passage.value_T[None], scores_NT, keep_NT)

    def append(self, passage: Passage) -> None:
        """Nothing is remembered: the next input brings its own context."""

    def reset(self) -> None:
        """Nothing is remembered."""

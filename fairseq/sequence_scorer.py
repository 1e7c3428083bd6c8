"""A batch of text becomes log-probabilities and memory keys of the positions it scores.

Shapes: B blocks, T positions of a padded block, D width, N scored positions of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fairseq.data.types import LMBatch


@dataclass(frozen=True)
class ScoredBatch:
    """What the language model says about the scored positions of a batch, in the order of the text."""

    block_N: Tensor
    """int64 number of the block each position stands in."""
    target_N: Tensor
    """int64 token that comes next."""
    logp_N: Tensor
    """float32 ln p of that token; empty when only keys were asked for."""
    norm_N: Tensor
    """float32 log-sum of the vocabulary's scores (adaptive softmax: of its head), as joint normalisation needs it."""
    key_ND: Tensor | None
    """Memory key of each position, in the model's precision."""


class SequenceScorer:
    """Runs a language model (or several, whose probabilities are averaged) over batches."""

    def __init__(
        self,
        models: Sequence[Any],
        *,
        key_tap: str | None = None,
        softmax_batch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args.

        models: language models in evaluation mode, on ``device``.
        key_tap: which inner state is the key; None when no keys are wanted.
        softmax_batch: positions whose vocabulary scores are held at once.
        Raises: ValueError when keys are wanted of several models.
        """
        if key_tap is not None and len(models) > 1:
            raise ValueError(f"keys come from one model, --path names {len(models)}")
        self.models = list(models)
        self.key_tap = key_tap
        self.softmax_batch = softmax_batch
        self.device = torch.device(device)

    @torch.inference_mode()
    def score(self, batch: LMBatch) -> ScoredBatch:
        """Log-probability of every scored target, and its key if one is wanted."""
        here = batch.to(self.device)
        scored_BT = here.scored_BT
        target_N = here.target_BT[scored_BT]
        parts = []
        key_ND = None
        for model in self.models:
            out = model(here.tokens_BT, key_tap=self.key_tap)
            parts.append(model.target_logp(out.hidden_BTD[scored_BT], target_N, self.softmax_batch))
            key_ND = out.key_BTD[scored_BT] if out.key_BTD is not None else None
        logp_N = torch.stack([logp.float() for logp, _ in parts])
        logp_N = logp_N[0] if len(parts) == 1 else torch.logsumexp(logp_N, 0) - torch.log(torch.tensor(len(parts)))
        return ScoredBatch(_block_of(batch), target_N, logp_N, parts[0][1].float(), key_ND)

    @torch.inference_mode()
    def keys(self, batch: LMBatch) -> ScoredBatch:
        """Keys alone: no softmax is computed."""
        here = batch.to(self.device)
        out = self.models[0](here.tokens_BT, key_tap=self.key_tap)
        empty = torch.empty(0)
        return ScoredBatch(_block_of(batch), here.target_BT[here.scored_BT], empty, empty, out.key_BTD[here.scored_BT])


def _block_of(batch: LMBatch) -> Tensor:
    return batch.ids_B[:, None].expand_as(batch.scored_BT)[batch.scored_BT.cpu()]

"""Distillation of a datastore into a decoder: its distribution is drawn to that of the neighbours at each token.

Shapes: B blocks, N scored positions, M entries of the largest distribution, V types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.criterions.base import Criterion, Loss, scored, wide_sum
from fairseq.criterions.configs import MemoryDecoderConfig

if TYPE_CHECKING:
    from fairseq.data.monolingual_dataset import MonolingualDataset
    from fairseq.data.types import LMBatch
    from fairseq.memory.retrieval.soft_targets import SoftTargets
    from fairseq.models.base import LanguageModel

_COMPARED = 65536  # tokens of the text and of the targets


class MemoryDecoderLoss(Criterion):
    """``a KL(p_kNN || p) + (1 - a) (-log p(token))``, for a of --knn-alpha; validation reports the latter alone.

    Source: arXiv 2508.09874, sec. 3.
    """

    config: MemoryDecoderConfig

    def __init__(self, config: MemoryDecoderConfig) -> None:
        super().__init__(config)
        self._targets: SoftTargets | None = None
        self._dataset: MonolingualDataset | None = None

    def attach(self, task: Any) -> None:
        """Open the targets. Raises: ValueError unless they are those of the split that is trained on."""
        from fairseq.memory.retrieval.soft_targets import SoftTargets

        if len(task.folders) > 1:
            raise ValueError(
                f"--knn-targets are of one text, and the data folders {':'.join(task.folders)} take turns; give one"
            )
        self._targets = targets = SoftTargets.open(str(self.config.knn_targets))
        self._dataset = task.blocks(self.train_subset, combine=True)
        split, tokens = self.train_subset, self._dataset.blocks.tokens
        if len(targets) != len(tokens):
            raise ValueError(
                f"--knn-targets {targets.path} has {len(targets)} tokens, split {split!r} has {len(tokens)}; export "
                f"the retrieval of the whole split (eval_lm.py --gen-subset {split} --sample-break-mode none)"
            )
        place_N = np.unique(np.linspace(0, len(tokens) - 1, _COMPARED).astype(np.int64))
        wrong = np.flatnonzero(targets.labels[place_N] != tokens[place_N].astype(np.int64))
        if len(wrong):
            place = int(place_N[wrong[0]])
            raise ValueError(
                f"--knn-targets {targets.path} is of another text: token {place} is {targets.labels[place]}, in split "
                f"{split!r} {tokens[place]}; export the retrieval of this split"
            )

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """See the class; the parts are reported as ``kl_loss`` and ``nll_loss``."""
        hidden_ND, target_N = scored(model(batch.tokens_BT, **batch.source), batch)
        if not model.training:
            return self.loss(-wide_sum(model.target_logp(hidden_ND, target_N)[0]), batch)
        logp_NV = model.vocab_logp(hidden_ND)
        token_NM, prob_NM = self._rows(batch, logp_NV.shape[1], logp_NV.device)
        kl, nll = divergence(prob_NM, logp_NV.gather(1, token_NM)), -wide_sum(logp_NV.gather(1, target_N[:, None]))
        alpha = self.config.knn_alpha
        return self.loss(alpha * kl + (1 - alpha) * nll, batch, kl_loss=kl, nll_loss=nll)

    def _rows(self, batch: LMBatch, num_types: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities at the scored positions of a batch, (N, M).

        Raises: ValueError for a token that is none of the model's.
        """
        assert self._targets is not None, "no task was attached"
        assert self._dataset is not None
        places = self._dataset.places(batch.ids_B.cpu().numpy())
        place_N = np.concatenate(places) if places else np.empty(0, np.int64)
        token_NM, prob_NM = self._targets.rows(place_N[place_N >= 0])
        if token_NM.size and not 0 <= int(token_NM.min()) <= int(token_NM.max()) < num_types:
            raise ValueError(
                f"--knn-targets {self._targets.path} holds token {int(token_NM.max())}, the model has {num_types} "
                "types: the file is damaged, or of another dictionary; export it again"
            )
        return torch.from_numpy(token_NM).to(device), torch.from_numpy(prob_NM).to(device)


def divergence(prob_NM: Tensor, logp_NM: Tensor) -> Tensor:
    """``KL(p || q)`` in nats, summed over positions, given p's entries and ln q at their tokens; 0 for a row of zeros.

    Both have the shape (N, M).
    """
    return wide_sum(torch.special.xlogy(prob_NM, prob_NM) - prob_NM * logp_NM)

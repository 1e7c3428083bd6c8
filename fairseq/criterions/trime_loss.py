"""TRIME: training with the batch as memory (arXiv 2205.12674). Four names, one formula, three rules of who sees whom.

Shapes: B blocks (segments), T positions, N scored positions, M memories from other ranks, D key width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.criterions.base import Criterion, Loss, scored, wide_sum
from fairseq.criterions.configs import TrimeConfig, TrimeExternalConfig, TrimeGatheredConfig
from fairseq.memory.trime.joint_loss import InBatchMemory, joint_loss
from fairseq.memory.trime.visibility import ELSEWHERE, EXTERNAL, LOCAL, LONG, VisibilityRule
from fairseq.runtime.distributed import Gathered, gather_ragged, rank_and_world

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.models.base import LanguageModel


class TrimeLoss(Criterion):
    """-log of each target's share of vocabulary and memory together, summed.

    Every scored position is a memory: its key is the model's state there, its value the target.
    """

    ranks_per_memory: int | None = None
    """Consecutive ranks that hold one text between them (trime_long_loss: --train-mem-size over --max-tokens).

    They share their memories, other ranks do not; None means all ranks."""
    default_tap = "last_ffn_input"
    """Inner state that is the key, unless --knn-keytype names another."""

    def __init__(self, config: TrimeConfig, rule: VisibilityRule) -> None:
        super().__init__(config)
        self.rule = rule
        self.warmup_epochs = config.ce_warmup_epoch
        self.gathers = isinstance(config, TrimeGatheredConfig)
        self.gather_grad = isinstance(config, TrimeGatheredConfig) and config.gather_grad
        self.cross_sent_ratio = config.cross_sent_ratio if isinstance(config, TrimeExternalConfig) else 0.0
        self.epoch = 1

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError for a model without the state that is to be the key."""
        if not hasattr(model, "key_dim"):
            raise ValueError(
                f"a TRIME loss needs a model that gives memory keys (--knn-keytype); {type(model).__name__} does not"
            )
        model.key_dim(self._tap(model))

    def start_epoch(self, epoch: int) -> None:
        """See ``Criterion``; decides about --ce-warmup-epoch."""
        self.epoch = epoch

    def __call__(self, model: LanguageModel, batch: LMBatch) -> Loss:
        """See the class. Reports the language model's own loss as ``ori_loss``, the joint one as ``norm_loss``."""
        warming_up = model.training and self.epoch <= self.warmup_epochs
        out = model(batch.tokens_BT, key_tap=None if warming_up else self._tap(model), **batch.source)
        hidden_ND, target_N = scored(out, batch)
        logp_N, norm_N = model.target_logp(hidden_ND, target_N)
        ori_loss = -wide_sum(logp_N)
        if warming_up:
            return self.loss(ori_loss, batch, ori_loss=ori_loss, norm_loss=torch.zeros_like(ori_loss))
        assert out.key_BTD is not None, "a key was asked for"
        key_ND = _scored_keys(out.key_BTD, batch)
        own = InBatchMemory(target_N, _lengths(batch), self._rule(model), 1 / math.sqrt(key_ND.shape[1]))
        memory, other_key_MD = self._with_other_ranks(self.adapt(own), key_ND)
        total = joint_loss(key_ND, logp_N, norm_N, memory, other_key_MD)
        _require_finite(total, key_ND, hidden_ND)
        return self.loss(total, batch, ori_loss=ori_loss, norm_loss=total)

    def adapt(self, memory: InBatchMemory) -> InBatchMemory:
        """The batch as memory with this loss's own settings."""
        return memory

    def _tap(self, model: LanguageModel) -> str:
        """Tap of the model's memory keys."""
        return getattr(getattr(model, "config", None), "knn_keytype", None) or self.default_tap

    def _rule(self, model: LanguageModel) -> VisibilityRule:
        """Visibility among the positions of a batch."""
        if model.training and self.cross_sent_ratio > 0 and torch.rand(()).item() < self.cross_sent_ratio:
            return ELSEWHERE
        return self.rule

    def _with_other_ranks(self, own: InBatchMemory, key_ND: Tensor) -> tuple[InBatchMemory, Tensor | None]:
        """Add what other ranks hold and this rank's positions may see."""
        rank, world = rank_and_world()
        if not self.gathers or world == 1:
            return own, None
        gathered = gather_ragged(key_ND, own.token_N, with_gradient=self.gather_grad and torch.is_grad_enabled())
        key_MD, token_M = (torch.cat(parts) for parts in zip(*self._visible(gathered, rank, world)))
        return replace(own, other_token_M=token_M), key_MD

    def _visible(self, gathered: Gathered, rank: int, world: int) -> list[tuple[Tensor, ...]]:
        """Keys and tokens of the ranks before and after this one; no rows where the rule hides them."""
        size = self.ranks_per_memory or world
        first = rank // size * size
        before = gathered.rows_of(first if self.rule.earlier else rank, rank)
        after = gathered.rows_of(rank + 1, min(first + size, world) if self.rule.later else rank + 1)
        return [tuple(x[rows] for x in gathered.tensors) for rows in (before, after)]


local_loss = functools.partial(TrimeLoss, rule=LOCAL)
long_loss = functools.partial(TrimeLoss, rule=LONG)
long_loss_same_device = functools.partial(TrimeLoss, rule=LONG)
external_loss = functools.partial(TrimeLoss, rule=EXTERNAL)


def _scored_keys(key_BTD: Tensor, batch: LMBatch) -> Tensor:
    if batch.num_scored == batch.scored_BT.numel():
        return key_BTD.flatten(0, 1)
    return key_BTD[batch.scored_BT]


def _lengths(batch: LMBatch) -> list[int]:
    """Scored positions in each block."""
    if batch.num_scored == batch.scored_BT.numel():  # known without asking a GPU
        return [batch.scored_BT.shape[1]] * batch.scored_BT.shape[0]
    lengths: list[int] = batch.scored_BT.sum(1).tolist()
    return lengths


def _require_finite(total: Tensor, key_ND: Tensor, hidden_ND: Tensor) -> None:
    """Raise ValueError where the loss, or a key that no position sees, is not a number."""
    if torch.isfinite(total.detach() + 0 * key_ND.detach().sum()):
        return
    broken = sum(int((~torch.isfinite(x.detach())).any(1).sum()) for x in (key_ND, hidden_ND))
    raise ValueError(
        f"the loss of this batch is {total.item()}: of {len(key_ND)} memory keys and as many outputs of the model, "
        f"{broken} are not finite; resume from an earlier checkpoint with a lower --lr, more --warmup-updates or a "
        "smaller --clip-norm, and with --bf16 or float32 instead of --fp16"
    )

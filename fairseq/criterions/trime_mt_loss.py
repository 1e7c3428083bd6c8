"""TRIME for translation: the other target sentences of the batch are the memory (arXiv 2205.12674, sec. 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fairseq.criterions.configs import TrimeTranslationConfig
from fairseq.criterions.trime_loss import TrimeLoss
from fairseq.memory.trime.visibility import ELSEWHERE
from fairseq.memory.types import Metric

if TYPE_CHECKING:
    from fairseq.memory.trime.joint_loss import InBatchMemory


class TrimeTranslationLoss(TrimeLoss):
    """-log of each target's share of vocabulary and memory together, summed.

    The key of a target position is what the output layer reads there, its value the target. A position sees those of
    other sentences, on other ranks too; of its own sentence none, neither before nor after it. With --topk-mem it sees
    only the most similar ones.
    """

    config: TrimeTranslationConfig
    default_tap = "model_output"

    def __init__(self, config: TrimeTranslationConfig) -> None:
        super().__init__(config, ELSEWHERE)

    def adapt(self, memory: InBatchMemory) -> InBatchMemory:
        """See the base class."""
        config = self.config
        metric = Metric.parse(config.dist_func)
        return replace(memory, scale=memory.scale / config.temp, metric=metric, topk=config.topk_mem)

"""From a text's candidates to its log-probabilities, as an evaluation combines them; the page does the same.

Shapes: N tokens, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fairseq.memory.combiners.joint import JointNormalization, mixed_where_found
from fairseq.memory.scoring import check_temperature, check_weight, interpolate, knn_logp
from fairseq.memory.types import Candidates, LogSums

INTERPOLATION, JOINT, GIVEN = "interpolation", "joint", "given"
"""Rules: kNN-LM's, TRIME's, and one whose result alone is known (a learned combiner, attention)."""


@dataclass(frozen=True)
class Setting:
    """What the sliders of the page set."""

    k: int | None = None
    """Candidates that count; None for all."""
    weight: float | None = None
    """Share of the memory's own distribution; None where nothing is interpolated."""
    temperature: float | None = None
    """Divides the similarities in that distribution."""
    joint_temperature: float | None = None
    """Divides them in the joint normalisation (TRIME); None without one."""

    def check(self, k: int) -> None:
        """Raise ValueError for values out of range; ``k`` candidates are at hand."""
        if self.k is not None and not 1 <= self.k <= max(1, k):
            raise ValueError(f"k {self.k} is not in 1..{k}, the candidates of each token that are at hand")
        if self.weight is not None:
            check_weight(self.weight, "lmbda")
        for temperature in (self.temperature, self.joint_temperature):
            if temperature is not None:
                check_temperature(temperature)

    def to_dict(self) -> dict[str, Any]:
        """As the schema has it."""
        return {
            "k": self.k,
            "lmbda": self.weight,
            "temperature": self.temperature,
            "joint_temperature": self.joint_temperature,
        }


@dataclass(frozen=True)
class TextPart:
    """Some tokens of a text with all that their log-probabilities are made of."""

    token_N: Tensor
    """int64."""
    lm_logp_N: Tensor
    """float32 ln p of the language model alone; NaN where it is not scored yet."""
    lm_norm_N: Tensor
    """float32 log-sum of the vocabulary's scores."""
    found: Candidates | None = None
    """The external memory's; None without one."""
    sums: Mapping[str, LogSums] = field(default_factory=dict)
    """Sums of the memories of the text, by name, at the joint temperature."""
    mixed_N: Tensor | None = None
    """float32 ln p of model and memory together, where the evaluation computed it."""

    def first_k(self, k: int | None) -> Candidates | None:
        """The first ``k`` candidates."""
        return self.found if self.found is None or k is None else self.found.nearest(k)

    @property
    def text_sums(self) -> LogSums | None:
        """Sums over all memories of the text."""
        total: LogSums | None = None
        for sums in self.sums.values():
            total = sums.plus(total)
        return total


@dataclass(frozen=True)
class Rule:
    """How a memory's candidates and the model's log-probabilities become one."""

    kind: str = INTERPOLATION
    dim: int = 1
    """Width of the keys: the joint normalisation divides inner products by its root."""
    with_external: bool = True
    """The external memory takes part in the joint normalisation."""
    only_where_found: bool = False
    """Interpolate only where anything was found; elsewhere the model alone."""

    def to_dict(self) -> dict[str, Any]:
        """As the schema has it."""
        return dict(vars(self))

    def logp(self, part: TextPart, setting: Setting) -> tuple[Tensor, Tensor]:
        """ln p of each token by the memory alone and by both together, (N,) float32.

        Where the rule is ``given`` the second is what the evaluation computed.
        Raises: ValueError for a setting out of range.
        """
        found = part.first_k(setting.k)
        memory_N = self._memory(part, found, setting)
        if self.kind == GIVEN or (found is None and self.kind == INTERPOLATION):
            return memory_N, part.lm_logp_N if part.mixed_N is None else part.mixed_N
        base_N = part.lm_logp_N
        if self.kind == JOINT:
            combine = JointNormalization(self.dim, setting.joint_temperature or 1.0, self.with_external)
            base_N = combine.joint(part.lm_logp_N, part.lm_norm_N, found, part.token_N, part.text_sums)
        if found is None or setting.weight is None or (setting.weight == 0.0 and self.kind == JOINT):
            return memory_N, base_N
        if self.kind == JOINT or self.only_where_found:
            return memory_N, mixed_where_found(base_N, memory_N, found.keep_NM.any(1), setting.weight)
        return memory_N, interpolate(base_N, memory_N, setting.weight)

    def _memory(self, part: TextPart, found: Candidates | None, setting: Setting) -> Tensor:
        """The memory's own log-probability; of the memories of the text where there is no other."""
        if found is not None:
            return knn_logp(found, part.token_N, self.own_temperature(setting))
        sums = part.text_sums
        if sums is None:
            return torch.full_like(part.lm_logp_N, torch.nan)
        return sums.hit_N - sums.whole_N.masked_fill(torch.isneginf(sums.whole_N), 0.0)

    def own_temperature(self, setting: Setting) -> float:
        """What divides the similarities in the memory's own distribution."""
        if setting.weight is None and self.kind == JOINT:
            return (setting.joint_temperature or 1.0) * math.sqrt(self.dim)
        return setting.temperature or 1.0

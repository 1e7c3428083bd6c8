"""What can be set about training losses (no torch here: these make the flags)."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    """What every loss can be told."""

    sentence_avg: bool = flag("--sentence-avg", default=False)
    """Divide gradients by the number of blocks (sentences) in an update instead of tokens."""


@dataclass(frozen=True, kw_only=True)
class LabelSmoothingConfig(CriterionConfig):
    """Cross-entropy against a target distribution that leaves something for every type."""

    label_smoothing: float = flag("--label-smoothing", default=0.0)
    """Share of the target's probability spread evenly over the other types; 0 means plain cross-entropy."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must lie in [0, 1), got {self.label_smoothing}")

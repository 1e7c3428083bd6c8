"""Options of training losses. No torch here: the flags are made from these."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    """Options that every loss has."""

    sentence_avg: bool = flag("--sentence-avg", default=False)
    """Divide gradients by the number of blocks (sentences) in an update instead of tokens."""


@dataclass(frozen=True, kw_only=True)
class LabelSmoothingConfig(CriterionConfig):
    """Cross-entropy against a target distribution that leaves something for every type."""

    label_smoothing: float = flag("--label-smoothing", default=0.0)
    """Share of the target's probability spread evenly over the other types; 0 means plain cross-entropy."""
    report_accuracy: bool = flag("--report-accuracy", default=False)
    """Report the percentage of targets that are the most probable type."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True)
class TrimeConfig(CriterionConfig):
    """Vocabulary and in-batch memory normalised together."""

    ce_warmup_epoch: int = flag("--ce-warmup-epoch", default=0)
    """Train without memory for so many epochs; validation always counts it in."""

    def __post_init__(self) -> None:
        if self.ce_warmup_epoch < 0:
            raise ValueError(f"--ce-warmup-epoch must not be negative, got {self.ce_warmup_epoch}")


@dataclass(frozen=True, kw_only=True)
class TrimeGatheredConfig(TrimeConfig):
    """The same with memories of other processes."""

    gather_grad: bool = flag("--gather-grad", default=False)
    """Let gradients flow to memories of other processes too, as if one process held the whole batch."""


@dataclass(frozen=True, kw_only=True)
class TrimeExternalConfig(TrimeGatheredConfig):
    """The same with every other segment as memory."""

    cross_sent_ratio: float = flag("--cross-sent-ratio", default=0.0)
    """Share of the training batches in which a position does not see its own segment's past."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cross_sent_ratio <= 1:
            raise ValueError(f"--cross-sent-ratio must lie in [0, 1], got {self.cross_sent_ratio}")

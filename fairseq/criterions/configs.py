"""Options of training losses. No torch here: the flags are made from these."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairseq.config import flag, require_at_least


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
class MemoryDecoderConfig(CriterionConfig):
    """A decoder that learns what neighbours say (Memory Decoder, arXiv 2508.09874)."""

    knn_targets: str | None = flag("--knn-targets", default=None)
    """File of fairseq-datastore export-knn-targets: the neighbours' distribution at each token of the training text."""
    knn_alpha: float = flag("--knn-alpha", default=0.5)
    """Share of the divergence from the neighbours' distribution in the loss; the rest is the cross-entropy."""

    def __post_init__(self) -> None:
        if not self.knn_targets:
            raise ValueError(
                "--criterion memory_decoder_loss needs --knn-targets: a file of fairseq-datastore export-knn-targets"
            )
        if not 0 <= self.knn_alpha <= 1:
            raise ValueError(f"--knn-alpha {self.knn_alpha} is not in [0, 1]; 0 is the cross-entropy alone")


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


@dataclass(frozen=True, kw_only=True)
class TrimeTranslationConfig(TrimeGatheredConfig):
    """Vocabulary and the other target sentences of the batch normalised together."""

    dist_func: str = flag("--dist-func", default="ip", choices=("ip", "l2"))
    """Similarity of two states: inner product, or minus the squared distance; both over the root of their width."""
    temp: float = flag("--temp", default=1.0)
    """Temperature that divides the similarities."""
    topk_mem: int | None = flag("--topk-mem", default=None)
    """A position sees only so many memories of the batch, the most similar ones; by default all."""
    label_smoothing: float = flag("--label-smoothing", default=0.0)
    """Accepted for scripts that give 0; no other value is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dist_func not in ("ip", "l2"):
            raise ValueError(f"--dist-func {self.dist_func!r} is neither ip nor l2")
        if not 0 < self.temp < math.inf:
            raise ValueError(f"--temp {self.temp} is not positive; 1 leaves the similarities as they are")
        require_at_least(1, topk_mem=self.topk_mem)
        if self.label_smoothing != 0:
            raise ValueError(
                f"--label-smoothing must be 0 with --criterion trime_mt_loss, got {self.label_smoothing}: memories "
                "belong to one target each, and there is none to smooth over; give 0, or use --criterion "
                "label_smoothed_cross_entropy"
            )

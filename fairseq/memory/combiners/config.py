"""Options of learned combiners. No torch here: the flags are made from these."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_within

KINDS = ("adaptive", "kster", "robust")


@dataclass(frozen=True, kw_only=True)
class CombinerTrainingConfig:
    """Options of a learned combiner and of its training."""

    kind: str = flag("--kind", default="adaptive", choices=KINDS)
    """adaptive (arXiv 2105.13022), kster (2109.09991) or robust (2210.08808)."""
    hidden: int = flag("--hidden-size", default=32)
    """Width of the network's inner layer."""
    dropout: float = flag("--combiner-dropout", default=0.2)
    """Share of the inner layer that is dropped in training."""
    rate: float = flag("--lr", default=3e-4)
    """Learning rate of Adam."""
    batch_tokens: int = flag("--batch-tokens", default=256)
    """Target tokens of an update."""
    max_epoch: int = flag("--max-epoch", default=100)
    """Passes over the tokens that are trained on, at most."""
    patience: int = flag("--patience", default=10)
    """Stop after so many passes without a better loss on the held-out sentences."""
    held_out: float = flag("--held-out", default=0.2)
    """Share of the sentences that decide when training stops."""

    def __post_init__(self) -> None:
        require_within(1, LARGEST_COUNT, hidden_size=self.hidden, batch_tokens=self.batch_tokens)
        require_within(1, LARGEST_COUNT, max_epoch=self.max_epoch, patience=self.patience)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--combiner-dropout {self.dropout} is not in [0, 1); 0 drops nothing")
        if not 0.0 < self.rate <= 100.0:
            raise ValueError(f"--lr {self.rate} is not above 0 and at most 100; 3e-4 is the default")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"--held-out {self.held_out} is not between 0 and 1; 0.2 is the default")

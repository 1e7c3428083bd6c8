"""Options of proofs."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag

SAMPLE = "sample"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ProofConfig:
    """What is proved beside the figures."""

    prove: str | None = flag("--prove", default=None, const=SAMPLE)
    """Check at some positions that the probabilities sum to 1, that later tokens change no score, that nothing entered
    a memory before it was scored, and that the datastore does not hold the text. A number says how many positions; all
    takes every one; without a value as many as cost less than 2% of the time."""

    def __post_init__(self) -> None:
        if self.prove in (None, SAMPLE, ALL):
            return
        if not str(self.prove).isdecimal() or int(str(self.prove)) < 1:
            raise ValueError(
                f"--prove {self.prove} is neither a number of positions (1 or more) nor all; give one, or --prove alone"
            )

    @property
    def is_on(self) -> bool:
        """True if anything is to be proved."""
        return self.prove is not None

    @property
    def takes_all(self) -> bool:
        """True if every position is checked."""
        return self.prove == ALL

    @property
    def count(self) -> int | None:
        """Positions that are checked; None where the time decides, or for all."""
        return None if self.prove in (None, SAMPLE, ALL) else int(str(self.prove))

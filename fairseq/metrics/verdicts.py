"""The outcome of proofs: a verdict for each question, with its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """The answer to one question about a figure.

    ```python
    Verdict("mass", True, "the probabilities sum to 1 within 2e-07 at 40 positions", {"largest_deviation": 2e-07})
    ```
    """

    name: str
    """mass, causality, order or disjointness."""
    passed: bool | None
    """None where the question does not arise, or cannot be answered."""
    words: str
    """The answer in one line."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What it rests on, as plain values."""

    @property
    def mark(self) -> str:
        """``ok``, ``FAILED`` or ``-``."""
        return "-" if self.passed is None else "ok" if self.passed else "FAILED"


@dataclass(frozen=True)
class Proof:
    """All verdicts about one figure."""

    verdicts: Sequence[Verdict]
    num_positions: int
    """Positions that were checked."""
    seconds: float
    """Time that the proofs took."""
    share: float
    """That time over the time of the whole run."""

    @property
    def passed(self) -> bool:
        """True if no verdict is a failure."""
        return all(verdict.passed is not False for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        verdicts = {
            verdict.name: {"passed": verdict.passed, "words": verdict.words, **verdict.figures}
            for verdict in self.verdicts
        }
        return {
            "passed": self.passed,
            "num_positions": self.num_positions,
            "seconds": self.seconds,
            "share_of_time": self.share,
            **verdicts,
        }

    def lines(self) -> Iterator[str]:
        """The report, a verdict a line."""
        for verdict in self.verdicts:
            yield f"proof of {verdict.name}: {verdict.mark}, {verdict.words}"
        yield f"proofs took {self.seconds:.2f}s ({100 * self.share:.1f}% of the run), {self.num_positions} positions"

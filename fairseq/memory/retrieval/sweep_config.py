"""Options of a sweep: many settings evaluated from one search."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from fairseq.config import UnreadableError, flag, require_at_least

DEFAULT_WEIGHTS = "0:0.9:0.05"
_MOST_VALUES = 10_000


def number_grid(text: str) -> tuple[float, ...]:
    """Parse ``0:0.9:0.05`` (first, last, step; the last is included), ``1,3,10``, or both separated by commas.

    Raises: UnreadableError when it is anything else, or more than 10,000 numbers.
    """
    found: dict[float, None] = {}
    for part in text.split(","):
        try:
            ends = [Decimal(number.strip()) for number in part.split(":")]
        except InvalidOperation:
            ends = []
        if len(ends) not in (1, 3) or not all(number.is_finite() for number in ends):
            raise UnreadableError(f"{part!r} is no number or range; write 0.25, a list 1,3,10 or FIRST:LAST:STEP")
        first, last, step = ends if len(ends) == 3 else (ends[0], ends[0], Decimal(1))
        if step <= 0 or last < first:
            raise UnreadableError(f"{part!r} is an empty range; FIRST:LAST:STEP goes up by a STEP above 0: 0:0.9:0.05")
        steps = int((last - first) / step)
        if steps + len(found) >= _MOST_VALUES:
            raise UnreadableError(f"{text!r} makes more than {_MOST_VALUES} numbers; give a larger STEP")
        found |= dict.fromkeys(float(first + i * step) for i in range(steps + 1))
    return tuple(sorted(found))


def count_grid(text: str) -> tuple[int, ...]:
    """Parse whole numbers as :func:`number_grid` does. Raises: UnreadableError for anything else."""
    numbers = number_grid(text)
    broken = [number for number in numbers if number != int(number)]
    if broken:
        raise UnreadableError(f"{text!r} holds {broken[0]}; give whole numbers, such as 8,64,1024 or 8:64:8")
    return tuple(int(number) for number in numbers)


def names(text: str) -> tuple[str, ...]:
    """Parse file names separated by commas. Raises: UnreadableError when one is empty."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise UnreadableError(f"{text!r} holds an empty name; give FILE or FILE,FILE")
    return found


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Evaluate many settings from the neighbours that --save-retrieval kept."""

    retrievals: tuple[str, ...] = flag("retrievals", default=())
    """The file; or those of all shards of one evaluation."""
    lmbda: tuple[float, ...] | None = flag("--lmbda", default=None, parse=number_grid)
    """Shares of the neighbours, as a list 0.1,0.25 or a range FIRST:LAST:STEP; by default 0:0.9:0.05."""
    temperature: tuple[float, ...] | None = flag(
        "--temperature", "--softmax-temp", "--knn-temp", default=None, parse=number_grid
    )
    """Values of --softmax-temp; by default that of the evaluation that was saved."""
    interp_temp: tuple[float, ...] | None = flag("--interp-temp", default=None, parse=number_grid)
    """Values of --interp-temp (eval_lm-trime.py only); by default that of the evaluation that was saved."""
    k: tuple[int, ...] | None = flag("--k", default=None, parse=count_grid)
    """Numbers of neighbours, at most the saved ones; by default those."""
    report: tuple[str, ...] = flag("--report", default=(), parse=names)
    """File (or files, separated by commas) of another split on which the best setting is evaluated."""
    explain: int = flag("--explain", default=0)
    """Number of the tokens that gained most, and of those that lost most, to show with their neighbours."""
    dstore_filename: str | None = flag("--dstore-filename", default=None)
    """The datastore for --explain, where it is not at its old place."""
    dictionary: str | None = flag("--dictionary", default=None)
    """The dict.txt for --explain, where it is not at its old place."""
    out: str | None = flag("--out", default=None)
    """Prefix of the names of the results, followed by .json, .csv and .png; by default the file and .sweep."""

    def __post_init__(self) -> None:
        if not self.retrievals:
            raise ValueError("name the file that eval_lm.py or generate.py --save-retrieval wrote")
        for weight in self.lmbda or ():
            if not 0.0 <= weight <= 1.0:
                raise ValueError(f"--lmbda {weight:g} is not in [0, 1]; 0 means the language model alone")
        for flag_name, values in (("--temperature", self.temperature), ("--interp-temp", self.interp_temp)):
            if values and min(values) <= 0.0:
                raise ValueError(f"{flag_name} {min(values):g} is not positive; 1 leaves the similarities as they are")
        require_at_least(1, k=min(self.k) if self.k else None)
        require_at_least(0, explain=self.explain)

    @property
    def weights(self) -> tuple[float, ...]:
        """The shares to evaluate."""
        return self.lmbda if self.lmbda is not None else number_grid(DEFAULT_WEIGHTS)

"""A scored text as columns: small ones in memory, the candidates of all tokens on disk or behind a function.

Shapes: N tokens in the order of the text, K candidates, n tokens of a part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fairseq.explorer.rules import TextPart
from fairseq.memory.types import Array, Candidates, LogSums
from fairseq.runtime.files import require_free_space

_TYPES: dict[str, np.dtype[Any]] = {
    "scores": np.dtype(np.float32),
    "values": np.dtype(np.int32),
    "rows": np.dtype(np.int64),
}


_WAY_OUT = "take a part of the text (--num-shards), lower --k or --max-knns, or name another folder by TMPDIR"


class CandidateArrays(NamedTuple):
    """Candidates of some tokens."""

    scores_nK: Array
    """float32 similarities before any temperature, higher is closer; -inf where there is none."""
    values_nK: Array
    """int32 tokens."""
    rows_nK: Array
    """int64 rows of the datastore; -1 where there is none."""


@dataclass
class TextTable:
    """The tokens of a text and what was computed for them.

    Columns, each (N,): ``token`` (int64), ``block`` (int64), ``document`` (int64), ``counted`` (bool: not a piece that
    the next one continues), ``lm`` and ``norm`` (float32; NaN until it is scored), and where there are such
    ``mixed`` (float32), ``searched`` (bool), ``pointers`` (int32), ``hit:NAME`` and ``whole:NAME`` (float32).
    """

    columns: dict[str, Array]
    k: int = 0
    """Candidates of a token at most; 0 where none are kept."""
    fetch: Callable[[slice], CandidateArrays] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.columns["token"])

    @property
    def num_ready(self) -> int:
        """Tokens that are scored."""
        return int(np.count_nonzero(~np.isnan(self.columns["lm"])))

    @property
    def sources(self) -> list[str]:
        """Names of the memories of the text."""
        return [name.removeprefix("hit:") for name in self.columns if name.startswith("hit:")]

    def candidates(self, rows: slice) -> CandidateArrays | None:
        """The candidates of some tokens; None where none are kept."""
        return None if self.fetch is None else self.fetch(rows)

    def part(self, rows: slice) -> TextPart:
        """Some tokens, as the rules take them."""
        columns = {name: torch.from_numpy(np.array(column[rows])) for name, column in self.columns.items()}
        found = None
        arrays = self.candidates(rows)
        if arrays is not None:
            scores_NK = torch.from_numpy(np.array(arrays.scores_nK))
            values_NK, rows_NK = (torch.from_numpy(np.array(x)) for x in (arrays.values_nK, arrays.rows_nK))
            found = Candidates(values_NK, scores_NK, scores_NK > -torch.inf, rows_NK)
        sums = {name: LogSums(columns[f"hit:{name}"], columns[f"whole:{name}"]) for name in self.sources}
        return TextPart(columns["token"], columns["lm"], columns["norm"], found, sums, columns.get("mixed"))

    def block_rows(self, at: int) -> slice:
        """The tokens of the block that a token stands in."""
        block_N = self.columns["block"]
        same = np.searchsorted(block_N, [block_N[at], block_N[at] + 1])
        return slice(int(same[0]), int(same[1]))


class TableWriter:
    """An empty table that is filled in any order; the candidates lie in files without a name, which end with it."""

    def __init__(
        self,
        num_tokens: int,
        k: int = 0,
        *,
        more: Iterable[str] = (),
        sources: Iterable[str] = (),
        length: int | None = None,
    ) -> None:
        """Args.

        num_tokens: room that the table has.
        k: candidates of a token at most; 0 for none.
        more: columns besides those that every table has.
        sources: names of memories of the text.
        length: tokens that the table begins with, if it is to grow; by default all.
        Raises: OSError when the disk has no room for the candidates.
        """
        if k and length is None:
            need = num_tokens * k * sum(dtype.itemsize for dtype in _TYPES.values())
            require_free_space(Path(tempfile.gettempdir()), need, f"up to {k} candidates of each token", _WAY_OUT)
        kinds = {"token": "i8", "block": "i8", "document": "i8", "counted": "?", "lm": "f4", "norm": "f4"}
        kinds |= {name: {"mixed": "f4", "searched": "?", "pointers": "i4"}[name] for name in more}
        kinds |= {f"{which}:{name}": "f4" for name in sources for which in ("hit", "whole")}
        self._columns = {name: np.full(num_tokens, np.nan if kind == "f4" else 0, kind) for name, kind in kinds.items()}
        self._arrays = {name: _on_disk((num_tokens, k), dtype) for name, dtype in _TYPES.items()} if k else {}
        self.table = TextTable({}, k, self._fetch if k else None)
        self._show(num_tokens if length is None else length)

    def _show(self, length: int) -> None:
        self.table.columns = {name: column[:length] for name, column in self._columns.items()}

    def extend(self, count: int) -> None:
        """Let the table hold so many tokens more, which were written before."""
        self._show(len(self.table) + count)

    def _fetch(self, rows: slice) -> CandidateArrays:
        # Nothing is written where a token has fewer candidates: a zero in the file is told from row 0 by one added.
        rows_nK = self._arrays["rows"][rows] - 1
        scores_nK = np.where(rows_nK < 0, -np.inf, self._arrays["scores"][rows]).astype(np.float32)
        return CandidateArrays(scores_nK, self._arrays["values"][rows], rows_nK)

    def write(self, places_n: Array, **columns: object) -> None:
        """Set columns of some tokens; ``lm`` comes last, for it says that a token is ready."""
        for name, values in sorted(columns.items(), key=lambda item: item[0] == "lm"):
            self._columns[name.replace("__", ":")][places_n] = values

    def write_candidates(self, places_n: Array, found: Candidates, rows_nM: torch.Tensor | None = None) -> None:
        """Set the candidates of some tokens; ``rows_nM`` are their rows where they do not say so themselves."""
        rows = found.rows_NM if rows_nM is None else rows_nM
        assert rows is not None, "candidates of a datastore have rows"
        width = min(found.scores_NM.shape[1], self.table.k)
        keep = found.keep_NM[:, :width].cpu().numpy()
        numbers = np.where(keep, rows[:, :width].cpu().numpy() + 1, 0)
        for name, values in (("scores", found.scores_NM), ("values", found.values_NM)):
            self._arrays[name][places_n, :width] = values[:, :width].cpu().numpy()
        self._arrays["rows"][places_n, :width] = numbers


def _on_disk(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros in a file that takes no room before they are written, and none after this process."""
    with tempfile.TemporaryFile(prefix="fairseq-explore-") as file:
        file.truncate(max(1, int(np.prod(shape)) * dtype.itemsize))
        return np.memmap(file, dtype, "r+", shape=shape)

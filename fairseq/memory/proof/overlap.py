"""Does a datastore hold the text that is evaluated with it? Shared n-grams, and documents that stand there whole.

Shapes: N tokens of the evaluated text, D documents of it, G n-grams of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.metrics.verdicts import Verdict

IntArray = npt.NDArray[np.int64]

LENGTHS = (13, 8)
"""Tokens of the n-grams: 13 is the usual measure of contamination (arXiv 2005.14165, app. C), 8 a stricter one."""
SHARE_LIMIT = 0.05
"""Share of the text within shared 13-grams from which on it counts as held by the store: quotations are less."""
_ROWS = 1 << 22
_NAMED = 10
_NO_ROWS: IntArray = np.empty(0, np.int64)
_NO_TOKEN = -1
_PLACES = 16
"""Places of the store at which a document is looked for, those that most of its n-grams point to."""


@dataclass(frozen=True)
class Overlap:
    """What a text and a datastore share."""

    num_tokens: int
    """Tokens of the text."""
    covered: dict[int, int]
    """Tokens of the text within n-grams that the store holds, by n."""
    duplicates: list[int]
    """Documents of at least the longest n-gram's length that stand in the store from end to end, by number."""
    num_documents: int

    def share(self, n: int) -> float:
        """Part of the text that is within shared n-grams."""
        return self.covered[n] / max(1, self.num_tokens)

    def verdict(self, name: str, unit: str = "document") -> Verdict:
        """The answer.

        Args:
            name: of the store.
            unit: what the documents are.
        """
        passed = not self.duplicates and self.share(LENGTHS[0]) <= SHARE_LIMIT
        shares = " and ".join(f"{100 * self.share(n):.2f}% in {n}-grams" for n in LENGTHS)
        words = f"{name} shares {shares} with the text"
        if self.duplicates:
            named = ", ".join(map(str, self.duplicates[:_NAMED])) + (", ..." if len(self.duplicates) > _NAMED else "")
            words += f", and holds {len(self.duplicates)} of its {self.num_documents} {unit}s whole: number {named}"
        elif not passed:
            words += f"; more than {100 * SHARE_LIMIT:g}% is no quotation"
        figures = {
            "shares": {str(n): self.share(n) for n in LENGTHS},
            "limit": SHARE_LIMIT,
            "duplicates": self.duplicates,
            "unit": unit,
        }
        return Verdict("disjointness", passed, words, figures)


def overlap(token_N: IntArray, starts_D: IntArray, values: Any, deleted: IntArray = _NO_ROWS) -> Overlap:
    """Compare a text with the values of a datastore, which are its text in its order.

    Args:
        token_N: the evaluated text.
        starts_D: where its documents begin, ascending.
        values: a ``ChunkedArray`` of whole numbers; read once, in order.
        deleted: rows that the store offers no longer, ascending.
    """
    found = {n: _Grams(token_N, n) for n in LENGTHS}
    for first, value_R in _parts(values, max(LENGTHS) - 1, deleted):
        for grams in found.values():
            grams.look_up(value_R, first)
    ends_D = np.append(starts_D[1:], len(token_N))
    longest = found[max(LENGTHS)]
    duplicates = [
        number
        for number, (start, end) in enumerate(zip(starts_D.tolist(), ends_D.tolist()))
        if end - start >= longest.n and _stands_in(token_N[start:end], longest.rows(start, end), values, deleted)
    ]
    covered = {n: int(grams.covered().sum()) for n, grams in found.items()}
    return Overlap(len(token_N), covered, duplicates, len(starts_D))


def _parts(values: Any, again: int, deleted: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Runs of the store's values with the row of their first; each begins with the last ``again`` of the one before.

    Deleted rows hold -1, which is no token.
    """
    before, first = np.empty(0, np.int64), 0
    for chunk in values.chunks:
        for start in range(0, len(chunk), _ROWS):
            part = np.asarray(chunk[start : start + _ROWS]).astype(np.int64)
            gone = deleted[slice(*np.searchsorted(deleted, (first, first + len(part))))]
            part[gone - first] = _NO_TOKEN
            joined = np.concatenate([before, part])
            yield first - len(before), joined
            first += len(part)
            before = joined[max(0, len(joined) - again) :]


class _Grams:
    """The n-grams of a text, and the first row of a store at which each begins."""

    def __init__(self, token_N: IntArray, n: int) -> None:
        from fairseq.memory.proof import overlap_kernels as kernels

        self.n, self._kernels = n, kernels
        self.num_tokens = len(token_N)
        self.hash_G = self._hashes(token_N)
        # At most half full.
        self._table = np.zeros(1 << max(4, (2 * len(self.hash_G)).bit_length()), np.int64)
        kernels.put(self.hash_G, self._table)
        self._row_G = np.full(len(self.hash_G), -1)

    def _hashes(self, token_N: IntArray) -> npt.NDArray[np.uint64]:
        hash_G = np.empty(max(0, len(token_N) - self.n + 1), np.uint64)
        self._kernels.hash_ngrams(np.ascontiguousarray(token_N, np.int64), self.n, hash_G)
        return hash_G

    def look_up(self, value_R: IntArray, first: int) -> None:
        """Note which n-grams begin in a run of the store's values."""
        self._kernels.look_up(self._hashes(value_R), first, self.hash_G, self._table, self._row_G)

    def _rows(self) -> IntArray:
        """Row of every place's n-gram, -1 for none; equal n-grams share the entry of the first of them."""
        first_G = np.unique(self.hash_G, return_index=True, return_inverse=True)
        return np.asarray(self._row_G[first_G[1]][first_G[2]])

    def rows(self, start: int, end: int) -> IntArray:
        """The store's rows of the n-grams within a part of the text."""
        if not hasattr(self, "_all_rows"):
            self._all_rows = self._rows()
        return self._all_rows[start : end - self.n + 1]

    def covered(self) -> npt.NDArray[np.bool_]:
        """True for each token within an n-gram that the store holds, (N,)."""
        change = np.zeros(self.num_tokens + 1, np.int64)
        begins = np.flatnonzero(self.rows(0, self.num_tokens) >= 0) if len(self.hash_G) else np.empty(0, np.int64)
        np.add.at(change, begins, 1)
        np.add.at(change, begins + self.n, -1)
        return np.asarray(np.cumsum(change[:-1]) > 0)


def _stands_in(token_T: IntArray, row_G: IntArray, values: Any, deleted: IntArray) -> bool:
    """True if the store holds a document from end to end, given the first row of each of its n-grams.

    An n-gram that stands earlier in the store too leads elsewhere; the other n-grams then say where to look.
    """
    if (row_G < 0).any():
        return False
    begins, votes = np.unique(row_G - np.arange(len(row_G)), return_counts=True)
    begins = begins[np.argsort(-votes, kind="stable")[:_PLACES]]
    ends = begins + len(token_T)
    is_whole = np.searchsorted(deleted, begins) == np.searchsorted(deleted, ends)
    inside = begins[(begins >= 0) & (ends <= len(values)) & is_whole]
    return any(bool((values.take(np.arange(row, row + len(token_T))).numpy() == token_T).all()) for row in inside)

"""Positions of the rows of a datastore in their text.

Rows follow the text, so a table of runs is enough: it is cheap to make and takes three numbers per document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_array


@dataclass(frozen=True)
class Documents:
    """Runs of consecutive rows of a document. The position of a row is that of its value, the token it predicts."""

    runs_R3: Array
    """int64: first row of the run, its document, and the offset of that row in the document."""

    @classmethod
    def unknown(cls) -> Documents:
        """Of a store without documents: one document, in which a row's position is its number."""
        return cls(np.zeros((1, 3), np.int64))

    @classmethod
    def read(cls, path: Path, num_rows: int) -> Documents:
        """Map a table. Raises: ValueError naming the file when it does not describe that many rows."""
        try:
            runs_R3 = read_array(path, "is not a table of documents", "copy it again", mapped=True)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, though the metadata list it; copy it too") from None
        if runs_R3.dtype != np.int64 or runs_R3.ndim != 2 or runs_R3.shape[1] != 3:
            raise ValueError(f"{path} holds {runs_R3.dtype} {runs_R3.shape}, not int64 (runs, 3); copy it again")
        first_R = runs_R3[:, 0]
        if not len(first_R) or first_R[0] != 0 or first_R[-1] >= num_rows or not (np.diff(first_R) > 0).all():
            raise ValueError(
                f"{path} does not describe {num_rows} rows, it is damaged or of another store; copy it again"
            )
        return cls(runs_R3)

    @classmethod
    def concatenated(cls, stores: Iterable[tuple[Documents, int, int]]) -> Documents:
        """Of concatenated stores, given (documents, first row, number of the first document) of each."""
        return cls(np.concatenate([documents.runs_R3 + [row, document, 0] for documents, row, document in stores]))

    @classmethod
    def of_positions(cls, document_N: Array, offset_N: Array, first_row: int = 0) -> Documents:
        """Of rows at these positions."""
        follows_N = np.zeros(len(document_N), dtype=bool)
        follows_N[1:] = (np.diff(document_N) == 0) & (np.diff(offset_N) == 1)
        starts_R = np.flatnonzero(~follows_N)
        return cls(np.stack([starts_R + first_row, document_N[starts_R], offset_N[starts_R]], 1).astype(np.int64))

    @classmethod
    def of_blocks(cls, starts_B: Array, sizes_B: Array, document_starts_D: Array, skip: int = 0) -> Documents:
        """Of blocks of a token stream, one row per token except the first ``skip``; no block spans two documents.

        Args:
            document_starts_D: start of each document in the stream, ascending; the first is not after the first block.
        """
        ends_B = np.cumsum(sizes_B) - skip
        row_B, position_B = ends_B - sizes_B, starts_B.astype(np.int64)
        position_B = position_B + np.maximum(0, -row_B)
        row_B, position_B = np.maximum(row_B, 0)[ends_B > 0], position_B[ends_B > 0]
        document_B = np.searchsorted(document_starts_D, position_B, side="right") - 1
        offset_B = position_B - document_starts_D[document_B]
        follows_B = np.zeros(len(row_B), dtype=bool)
        follows_B[1:] = (np.diff(document_B) == 0) & (np.diff(offset_B) == np.diff(row_B))
        return cls(np.stack([row_B, document_B, offset_B], 1)[~follows_B].astype(np.int64))

    def where(self, ids_N: Array) -> tuple[Array, Array]:
        """Document and offset in it of some rows; -1 for the id -1."""
        run_N = np.searchsorted(self.runs_R3[:, 0], np.maximum(ids_N, 0), side="right") - 1
        first_N, document_N, offset_N = (self.runs_R3[:, column][run_N] for column in range(3))
        missing_N = ids_N < 0
        return np.where(missing_N, -1, document_N), np.where(missing_N, -1, offset_N + ids_N - first_N)

    def rows_of(self, documents: Sequence[int], num_rows: int) -> Array:
        """All rows of some documents, ascending."""
        chosen = np.flatnonzero(np.isin(self.runs_R3[:, 1], documents))
        ends_R = np.append(self.runs_R3[1:, 0], num_rows)
        rows = [np.arange(self.runs_R3[run, 0], ends_R[run]) for run in chosen]
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

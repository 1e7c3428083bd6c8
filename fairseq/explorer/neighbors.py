"""Rows of a datastore in the text around them, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.explorer.words import Words, words_of
from fairseq.memory.types import Array

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

BEFORE, AFTER = 14, 8
"""Tokens of context that are shown."""
_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class NeighborTexts:
    """Shows rows of a store."""

    words: Words
    store: Datastore | None = None
    """None where it is not at hand: rows and tokens are known all the same."""
    source_of: Callable[[int], str] | None = None
    """Source sentence of a document, for a store of pairs."""
    has_rows: bool = True
    """False where a store is made for each sentence, so that its rows have no lasting numbers."""

    def show(
        self, rows_S: Array, values_S: Array, scores_S: Array, places_S: Array, target: int
    ) -> list[dict[str, Any]]:
        """The neighbours as the schema has them.

        Args:
            rows_S: int64 rows of the store.
            values_S: their tokens, as they were when the text was scored.
            places_S: their places among the token's candidates.
            target: the token that did come next; -1 where that is not known.
        """
        contexts, documents_S, offsets_S = self._contexts(rows_S)
        deleted_S = np.isin(rows_S, self.store.deleted) if self.store is not None else np.zeros(len(rows_S), bool)
        shown = []
        for i, row in enumerate(rows_S.tolist()):
            before, after = _sides(contexts[i]) if contexts is not None else (_NOTHING, _NOTHING)
            neighbor: dict[str, Any] = {
                "place": int(places_S[i]),
                "row": row if self.has_rows else -1,
                "document": int(documents_S[i]),
                "offset": int(offsets_S[i]),
                "value": int(values_S[i]),
                "text": self.words.word(int(values_S[i])),
                "score": float(scores_S[i]),
                "agrees": int(values_S[i]) == target,
                "deleted": bool(deleted_S[i]),
                "before": words_of(self.words, before),
                "after": words_of(self.words, after),
            }
            if self.source_of is not None and neighbor["document"] >= 0:
                neighbor["source"] = self.source_of(neighbor["document"])
            shown.append(neighbor)
        return shown

    def _contexts(self, rows_S: Array) -> tuple[Array | None, Array, Array]:
        if self.store is None or not len(rows_S):
            nothing = np.full(len(rows_S), -1)
            return None, nothing, nothing
        contexts = self.store.context(rows_S, before=BEFORE, after=AFTER).numpy()
        documents_S, offsets_S = self.store.where(rows_S)
        return contexts, documents_S if self.store.has_documents else np.full(len(rows_S), -1), offsets_S


def _sides(token_C: Array) -> tuple[Array, Array]:
    """The tokens before and after the middle, up to the first gap on each side."""
    before, after = token_C[:BEFORE], token_C[BEFORE + 1 :]
    gaps = np.flatnonzero(before < 0)
    before = before[gaps[-1] + 1 :] if len(gaps) else before
    gaps = np.flatnonzero(after < 0)
    return before, after[: gaps[0]] if len(gaps) else after

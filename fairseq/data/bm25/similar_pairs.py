"""Pairs whose sources are most like a sentence: by BM25, and the best of these by edit distance.

Source: arXiv 2302.12188, sec. 3.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.data.bm25.index import SCORING
from fairseq.data.language_pair_dataset import Sentences
from fairseq.data.monolingual_dataset import Tokens

_CANDIDATES = 64  # of BM25, from which edit distance chooses


class SimilarSources:
    """An index of sources in memory; words are the pieces of the dictionary."""

    def __init__(self, sources: Sentences) -> None:
        """Index all sentences. Raises: ValueError when there are none."""
        if not len(sources):
            raise ValueError("there are no pairs of sentences to search; name another split")
        self.sources = sources
        self._retriever: Any = importlib.import_module("bm25s").BM25(**SCORING)
        self._retriever.index([_words(sources[i]) for i in range(len(sources))], show_progress=False)

    def nearest(self, sentence: Tokens, count: int) -> list[int]:
        """Numbers of at most ``count`` sources, the most similar first; none without a word in common."""
        among = min(max(_CANDIDATES, count), len(self.sources))
        found = self._retriever.retrieve([_words(sentence)], k=among, show_progress=False)
        candidates = found.documents[0][found.scores[0] > 0]
        if not len(candidates):
            return []
        similar = similarities(sentence, [self.sources[int(i)] for i in candidates])
        best = np.lexsort((candidates, -similar))[:count]
        return [int(i) for i in candidates[best]]


def _words(sentence: Tokens) -> list[str]:
    return [str(token) for token in sentence[:-1].tolist()]  # all but </s>


def similarities(sentence: Tokens, others: Sequence[Tokens]) -> npt.NDArray[np.float64]:
    """1 less the edit distance over the longer length, for each of ``others``; in tokens."""
    lengths = np.array([len(other) for other in others], dtype=np.int64)
    padded = np.full((len(others), int(lengths.max(initial=0))), -1, dtype=np.int64)
    for row, other in zip(padded, others):
        row[: len(other)] = other
    place = np.arange(padded.shape[1] + 1)
    distance = np.broadcast_to(place, (len(others), len(place)))  # to every beginning of every other sentence
    for step, token in enumerate(sentence.tolist(), 1):
        kept_or_changed = distance[:, :-1] + (padded != token)
        best = np.concatenate([np.full((len(others), 1), step), np.minimum(kept_or_changed, distance[:, 1:] + 1)], 1)
        distance = np.minimum.accumulate(best - place, axis=1) + place  # insertions, one place after the other
    whole = distance[np.arange(len(others)), lengths]
    similar: npt.NDArray[np.float64] = 1.0 - whole / np.maximum(lengths, max(len(sentence), 1))
    return similar

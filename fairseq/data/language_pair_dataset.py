"""Sentence pairs of two languages as batches for translation.

Shapes: B sentences, S positions of the longest source, T of the longest target.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.data.monolingual_dataset import Tokens, pad_rows
from fairseq.data.types import TranslationBatch

Sizes = npt.NDArray[np.int64]


class Sentences:
    """Sentences of one or several binarised texts, one text after the other."""

    def __init__(self, texts: Sequence[MMapIndexedDataset], longest: int | None = None) -> None:
        """Serve ``texts``; with ``longest``, sentences are cut to that many tokens, the last of which is kept."""
        self.texts = list(texts)
        self.longest = longest
        self._first = np.cumsum([0, *(len(text) for text in texts)])
        sizes = np.concatenate([np.empty(0, np.int64), *(text.sizes for text in texts)])
        self.sizes: Sizes = sizes.astype(np.int64) if longest is None else np.minimum(sizes, longest).astype(np.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Tokens:
        """The tokens of sentence ``i``, </s> included."""
        which = int(np.searchsorted(self._first, i, side="right")) - 1
        tokens = self.texts[which][i - int(self._first[which])]
        if self.longest is None or len(tokens) <= self.longest:
            return tokens
        return np.concatenate([tokens[: self.longest - 1], tokens[-1:]])

    @property
    def largest_token(self) -> int:
        """The largest token number; -1 when there is none."""
        return max((int(text.tokens.max()) for text in self.texts if len(text.tokens)), default=-1)


@dataclass(frozen=True)
class Side:
    """One language of a data set."""

    sentences: Sentences
    pad: int
    eos: int


class LanguagePairDataset:
    """Source and target sentences. A target is predicted from its source and its own beginning, </s> first."""

    unit = "sentence"

    def __init__(
        self, source: Side, target: Side | None, *, left_pad_source: bool = True, max_source_positions: int = 1024
    ) -> None:
        """Serve the pairs; without ``target`` there are sources alone, to be translated.

        Raises: ValueError when source and target differ in their number of sentences.
        """
        self.source_side = source
        self.target_side = target
        self.left_pad_source = left_pad_source
        self.max_source_positions = max_source_positions
        self.source_sizes = source.sentences.sizes
        self.target_sizes = self.source_sizes if target is None else target.sentences.sizes
        if len(self.source_sizes) != len(self.target_sizes):
            raise ValueError(
                f"the source has {len(self.source_sizes)} sentences, the target {len(self.target_sizes)}; they must be "
                "translations of each other, line by line: run preprocess.py on both again"
            )

    @property
    def sizes(self) -> Sizes:
        """Tokens of the longer side of each pair."""
        sizes: Sizes = np.maximum(self.source_sizes, self.target_sizes)
        return sizes

    def __len__(self) -> int:
        return len(self.source_sizes)

    def order(self, seed: int, *, shuffle: bool) -> Sizes:
        """Numbers of the pairs by length, of the target within that of the source; equals in an order drawn by seed.

        It is fairseq's order, so that stores have the same rows.
        """
        count = len(self)
        order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
        order = order[np.argsort(self.target_sizes[order], kind="stable")]
        return order[np.argsort(self.source_sizes[order], kind="stable")]

    def fits(self, max_positions: int) -> npt.NDArray[np.bool_]:
        """True for the pairs that a model reads: targets of ``max_positions`` tokens, sources of its other limit."""
        fits: npt.NDArray[np.bool_] = self.source_sizes <= self.max_source_positions
        return fits if self.target_side is None else fits & (self.target_sizes <= max_positions)

    def with_source_limit(self, longest: int) -> LanguagePairDataset:
        """The same pairs, of which those fit whose source has at most ``longest`` tokens too."""
        limited = copy.copy(self)
        limited.max_source_positions = min(self.max_source_positions, longest)
        return limited

    def lengths(self, i: int) -> str:
        """Lengths of a pair, in words."""
        if self.target_side is None:
            return f"{self.source_sizes[i]} source tokens"
        return f"{self.source_sizes[i]} source and {self.target_sizes[i]} target tokens"

    def limits(self, max_positions: int) -> str:
        """What a model reads, in words."""
        if self.target_side is None:
            return f"{self.max_source_positions}"
        return f"{self.max_source_positions} and {max_positions}"

    def source(self, i: int) -> Tokens:
        """The source sentence of pair ``i``, </s> included."""
        return self.source_side.sentences[i]

    def target(self, i: int) -> Tokens:
        """The target sentence of pair ``i``, </s> included."""
        assert self.target_side is not None, "there are sources alone"
        return self.target_side.sentences[i]

    def batch_order(self, indices: npt.ArrayLike) -> Sizes:
        """Numbers of the pairs in the order of their rows in a batch, longer sources first.

        Rows of a datastore follow from it; equals come in the order of PyTorch's own sort, as in fairseq.
        """
        ids = np.asarray(indices, dtype=np.int64)
        ordered: Sizes = ids[torch.from_numpy(self.source_sizes[ids]).sort(descending=True).indices.numpy()]
        return ordered

    def collate(self, indices: npt.ArrayLike) -> TranslationBatch:
        """The batch of these pairs, in the order of :meth:`batch_order`."""
        ids = self.batch_order(indices)
        if not len(ids):
            return TranslationBatch.empty()
        source_BS = pad_sentences([self.source(i) for i in ids.tolist()], self.source_side.pad, self.left_pad_source)
        side = self.target_side
        if side is None:
            nothing = torch.full((len(ids), 1), self.source_side.eos)
            return TranslationBatch(
                torch.from_numpy(ids), nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), 0, source_BS
            )
        none, eos = np.empty(0, dtype=np.int64), np.array([side.eos], dtype=np.int64)
        targets = (self.target(i) for i in ids.tolist())
        batch = pad_rows(ids, ((none, np.concatenate([eos, target[:-1]]), target) for target in targets), side.pad)
        return TranslationBatch(
            batch.ids_B, batch.tokens_BT, batch.target_BT, batch.scored_BT, batch.num_scored, source_BS
        )


def pad_sentences(sentences: Sequence[Tokens], pad: int, left: bool) -> torch.Tensor:
    """Sentences as the rows of an int64 tensor (B, S), padded on the left or on the right."""
    width = max(len(sentence) for sentence in sentences)
    rows_BS = np.full((len(sentences), width), pad, dtype=np.int64)
    for row, sentence in zip(rows_BS, sentences):
        row[width - len(sentence) if left else 0 :][: len(sentence)] = sentence
    return torch.from_numpy(rows_BS)

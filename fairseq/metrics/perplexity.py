"""The evaluation's figures: perplexity over tokens or words, and how it spreads over the vocabulary."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fairseq.metrics.training import perplexity
from fairseq.metrics.word_loss import joined, loss_sums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fairseq.data.dictionary import Dictionary
    from fairseq.metrics.verdicts import Proof

logger = logging.getLogger(__name__)

_BUCKETS = (10, 100, 1000, 10000)  # bounds of training counts in the frequency table
_PLACES = (0, 1, 4, 16, 64, 256, 1024, 4096)  # bounds of places in a block


@dataclass(frozen=True)
class Figures:
    """Summary of an evaluation."""

    loss_base2: float
    """Mean -log2 p per counted token (or per word, with --remove-bpe)."""
    perplexity: float
    """2 to the loss."""
    num_tokens: int
    """Tokens scored."""
    num_counted: int
    """Divisor of the mean: words with --remove-bpe, else the tokens scored."""
    num_total_tokens: int
    """Tokens the evaluated part of the text has."""
    seconds: float
    """Time of scoring, without loading."""
    buckets: list[dict[str, Any]] = field(default_factory=list)
    """Loss by how often the target occurred in training."""
    positions: list[dict[str, Any]] = field(default_factory=list)
    """Loss by place in the block."""
    num_searched: int | None = None
    """Tokens whose neighbours RetoMaton had to search; None without it."""
    proof: Proof | None = None
    """Verdicts of --prove; None without it."""

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens over seconds."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        more: dict[str, Any] = {} if self.num_searched is None else {"num_searched": self.num_searched}
        more |= {} if self.proof is None else {"proof": self.proof.to_dict()}
        return more | {
            "loss_base2": self.loss_base2,
            "perplexity": self.perplexity,
            "num_tokens": self.num_tokens,
            "num_counted": self.num_counted,
            "num_total_tokens": self.num_total_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "buckets": self.buckets,
            "positions": self.positions,
        }


class _Word(NamedTuple):
    text: str
    logp: float
    is_joined: bool
    """Made of several pieces."""


class WordStatistics(NamedTuple):
    """A row of ``--output-word-stats``, in the order of fairseq's columns; log-probabilities are natural."""

    word: str
    num: int
    """Occurrences."""
    logp: float
    """Sum over its occurrences."""
    is_joined: bool
    """Joined from pieces (``--remove-bpe``)."""
    next_logp: float
    """Sum over the words after it in the same block."""
    num_next: int
    """Number of those words."""

    def plus(self, logp: float, next_logp: float | None) -> WordStatistics:
        """With one occurrence more; ``next_logp`` is None for the last word of a block."""
        more = () if next_logp is None else (next_logp,)
        return self._replace(
            num=self.num + 1,
            logp=self.logp + logp,
            next_logp=self.next_logp + sum(more),
            num_next=self.num_next + len(more),
        )


def _by_place(block_N: np.ndarray[Any, Any], logp_N: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Loss of the tokens in each range of places in their block, which is sorted by block; the first place is 0."""
    first_B = np.flatnonzero(np.r_[True, block_N[1:] != block_N[:-1]])
    place_N = np.arange(len(block_N)) - np.repeat(first_B, np.diff(np.r_[first_B, len(block_N)]))
    rows: list[dict[str, Any]] = []
    for low, high in zip(_PLACES, (*_PLACES[1:], np.iinfo(np.int64).max)):
        inside_N = (place_N >= low) & (place_N < high) & ~np.isneginf(logp_N)
        if inside_N.any():
            loss = -float(logp_N[inside_N].mean()) / math.log(2)
            last = int(place_N[inside_N].max())
            rows.append({"first": low, "last": last, "num_tokens": int(inside_N.sum())})
            rows[-1] |= {"loss_base2": loss, "perplexity": perplexity(loss)}
    return rows


class PerplexityReport:
    """Collects the log-probability of each scored token; batches may come in any order."""

    def __init__(self, dictionary: Dictionary, bpe_mark: str | None = None) -> None:
        """``bpe_mark`` ends every piece that a following piece continues, e.g. "@@ "."""
        self.dictionary = dictionary
        self.blocks: list[np.ndarray[Any, Any]] = []
        self.tokens: list[np.ndarray[Any, Any]] = []
        self.logps: list[np.ndarray[Any, Any]] = []
        self.mark = bpe_mark.rstrip() if bpe_mark else ""
        if self.mark == "sentencepiece":
            raise ValueError("--remove-bpe sentencepiece is not offered for evaluation; give the mark of the pieces")
        pieces = [i for i in range(len(dictionary)) if dictionary[i].endswith(self.mark)] if self.mark else []
        self.continues = np.zeros(len(dictionary), dtype=bool)
        self.continues[pieces] = True

    def add(self, block_N: Tensor, target_N: Tensor, logp_N: Tensor) -> None:
        """Add scored positions; those of one block in the order of the text."""
        self.blocks.append(block_N.cpu().numpy())
        self.tokens.append(target_N.cpu().numpy())
        self.logps.append(logp_N.double().cpu().numpy())

    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Block number, target and ln p of every scored token, in the order of the text."""
        if not self.tokens:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        block = np.concatenate(self.blocks)
        order = np.argsort(block, kind="stable")
        return block[order], np.concatenate(self.tokens)[order], np.concatenate(self.logps)[order]

    def figures(self, num_total_tokens: int, seconds: float) -> Figures:
        """The figures so far. Scores of minus infinity are dropped with a warning, as their mean has no meaning.

        Raises: ValueError when nothing was scored.
        """
        block, token, logp = self.arrays()
        if not len(token):
            raise ValueError(
                f"nothing was scored: all {num_total_tokens} tokens are in blocks longer than the model's positions "
                "or the part of the text is empty; --score-all splits long blocks"
            )
        sums = loss_sums(block, self.continues[token], logp)
        if sums.num_impossible:
            logger.warning("%d tokens have probability 0 and are dropped from the perplexity", sums.num_impossible)
        possible = ~np.isneginf(logp)
        buckets = self._buckets(token[possible], logp[possible])
        positions = _by_place(block, logp)
        return Figures(
            sums.loss_base2,
            sums.perplexity,
            len(token),
            sums.num_counted,
            num_total_tokens,
            seconds,
            buckets,
            positions,
        )

    def _buckets(self, token: np.ndarray[Any, Any], logp: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        # Special symbols have no training count of their own (</s> stands once in every line, <unk> for many types).
        special = token < self.dictionary.nspecial
        counts = np.asarray(self.dictionary.counts, dtype=np.int64)[token]
        bounds = (0, *_BUCKETS, np.iinfo(np.int64).max)
        ranges = [(low, high, ~special & (counts >= low) & (counts < high)) for low, high in zip(bounds, bounds[1:])]
        rows: list[dict[str, Any]] = []
        for low, high, inside in [(0, 0, special), *ranges]:
            if inside.any():
                loss = -float(logp[inside].mean()) / math.log(2)
                upper = int(high) if high < bounds[-1] else None
                rows.append({"special": not high, "count_from": int(low), "count_below": upper})
                rows[-1] |= {"num_tokens": int(inside.sum()), "loss_base2": loss, "perplexity": perplexity(loss)}
        return rows

    def words(self) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """Per block: its number and its words with their ln p, pieces joined."""
        for number, words in self._joined_words():
            yield number, [(word.text, word.logp) for word in words]

    def word_statistics(self) -> list[WordStatistics]:
        """Counts and sums per word, frequent words first and those of one count in the order of the text."""
        found: dict[str, WordStatistics] = {}
        for _, words in self._joined_words():
            # fairseq takes the next score that is not 0: the pieces of a word that were joined to it have 0 there.
            following: list[float | None] = [None] * (len(words) + 1)
            for place in reversed(range(len(words))):
                following[place] = words[place].logp or following[place + 1]
            for word, after in zip(words, following[1:]):
                row = found.get(word.text) or WordStatistics(word.text, 0, 0.0, word.is_joined, 0.0, 0)
                found[word.text] = row.plus(word.logp, after)
        return sorted(found.values(), key=lambda row: -row.num)

    def _joined_words(self) -> Iterator[tuple[int, list[_Word]]]:
        block, token, logp = self.arrays()
        is_joined = joined(block, self.continues[token])
        starts: list[int] = np.flatnonzero(np.r_[True, block[1:] != block[:-1]]).tolist() if len(block) else []
        for start, end in zip(starts, [*starts[1:], len(block)]):
            line: list[_Word] = []
            text, score, pieces = "", 0.0, 0
            for i in range(start, end):
                piece = self.dictionary[int(token[i])]
                text, score = text + (piece.removesuffix(self.mark) if is_joined[i] else piece), score + float(logp[i])
                pieces += 1
                if not is_joined[i]:
                    line.append(_Word(text, score, pieces > 1))
                    text, score, pieces = "", 0.0, 0
            yield int(block[start]), line

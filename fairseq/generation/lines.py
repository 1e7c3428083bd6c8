"""Generated text as the lines that fairseq's programs print: S, T, H, D and P with the sentence's number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.data.dictionary import join_pieces

if TYPE_CHECKING:
    from fairseq.data.codecs import TextCodec
    from fairseq.data.dictionary import Dictionary
    from fairseq.generation.sequence_generator import Hypothesis


@dataclass(frozen=True)
class Wording:
    """How token numbers become text."""

    source: Dictionary | None
    """Dictionary of the source; None for a language model."""
    target: Dictionary
    codec: TextCodec
    remove_bpe: str | None
    """Mark that joins the pieces of a word."""

    def of_source(self, tokens: Tensor) -> str:
        """Source text, detokenised."""
        assert self.source is not None
        return self.codec.decode(self.source.string(tokens, self.remove_bpe))

    def of_reference(self, tokens: Tensor) -> str:
        """Reference text, detokenised."""
        return self.codec.decode(self.joined_reference(tokens))

    def joined_reference(self, tokens: Tensor) -> str:
        """Reference text with the words joined; unknown words are written so that no hypothesis has them."""
        unknown, escaped = self.target[self.target.unk()], f"<{self.target[self.target.unk()]}>"
        words = (escaped if word == unknown else word for word in self.target.string(tokens).split(" "))
        return join_pieces(" ".join(words), self.remove_bpe)

    def of_hypothesis(self, tokens: Tensor) -> str:
        """Generated text with the words joined, before it is detokenised."""
        return self.target.string(tokens, self.remove_bpe)


@dataclass(frozen=True)
class Output:
    """One sentence and what was generated for it."""

    number: int
    source: str | None
    reference: str | None
    hypotheses: Sequence[tuple[Hypothesis, str, str]]
    """Each with its words joined, and detokenised."""

    def lines(self) -> Iterator[str]:
        """fairseq's lines; scores are to the base 2."""
        if self.source is not None:
            yield f"S-{self.number}\t{self.source}"
        if self.reference is not None:
            yield f"T-{self.number}\t{self.reference}"
        for hypothesis, joined, text in self.hypotheses:
            score = float(torch.tensor(hypothesis.score, dtype=torch.float32) / math.log(2))
            yield f"H-{self.number}\t{score}\t{joined}"
            yield f"D-{self.number}\t{score}\t{text}"
            each = " ".join(f"{value:.4f}" for value in (hypothesis.logp / math.log(2)).tolist())
            yield f"P-{self.number}\t{each}"

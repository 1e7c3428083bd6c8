"""How token numbers become text, by a dictionary, a tokenizer, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fairseq.memory.types import Array

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary

_META_SPACE = "\u2581"
"""What sentencepiece writes for the space before a word."""


class Words(Protocol):
    """The text of tokens."""

    separator: str
    """What stands between two tokens."""

    def word(self, token: int) -> str:
        """Text of one token."""
        ...

    def counts(self) -> Array | None:
        """int64 occurrences of each token, (V,); None where nobody counted."""
        ...


class NumberWords:
    """Token numbers, where nothing says what they mean."""

    separator = " "

    def word(self, token: int) -> str:
        """See ``Words``."""
        return str(token)

    def counts(self) -> Array | None:
        """See ``Words``."""
        return None


class DictionaryWords:
    """The words of a dictionary, with its counts in the training text."""

    separator = " "

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary

    def word(self, token: int) -> str:
        """See ``Words``; a number where the dictionary has no such token."""
        return self.dictionary[token] if 0 <= token < len(self.dictionary) else str(token)

    def counts(self) -> Array | None:
        """See ``Words``; special symbols have none of their own."""
        counts: Array = np.array(self.dictionary.counts, np.int64)
        counts[: self.dictionary.nspecial] = -1
        return counts


class TokenizerWords:
    """Tokens of a Hugging Face tokenizer, with their spaces."""

    separator = ""

    def __init__(self, tokenizer: Any, count: Callable[[], Array] | None = None) -> None:
        """``count`` counts the tokens of the memory; called when somebody asks."""
        self.tokenizer, self._count = tokenizer, count
        self.word = lru_cache(1 << 16)(self._word)  # decoding a token takes microseconds, and few are asked for often

    def _word(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and piece.startswith(_META_SPACE):
            return piece.replace(_META_SPACE, " ")
        return str(self.tokenizer.decode([token]))

    def counts(self) -> Array | None:
        """See ``Words``."""
        return None if self._count is None else self._count()


def words_of(words: Words, tokens: Sequence[int] | Array) -> list[str]:
    """The text of each token."""
    return [words.word(int(token)) for token in tokens]

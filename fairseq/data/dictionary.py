"""Symbols and their numbers, in fairseq's ``dict.txt`` format: ``symbol count`` per line, no special symbols."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.runtime.atomic_files import replacing

if TYPE_CHECKING:
    from torch import Tensor

_OVERWRITE = "#fairseq:overwrite"


class Dictionary:
    """A two-way map between symbols and numbers, with the count of each symbol.

    The specials <s>, <pad>, </s> and <unk> are numbers 0 to 3; an unknown symbol reads as <unk>.
    """

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.counts: list[int] = []
        self.indices: dict[str, int] = {}
        for symbol in ("<s>", "<pad>", "</s>", "<unk>"):
            self.add_symbol(symbol)
        self.nspecial = len(self.symbols)

    def bos(self) -> int:
        """Number of <s>."""
        return 0

    def pad(self) -> int:
        """Number of <pad>."""
        return 1

    def eos(self) -> int:
        """Number of </s>."""
        return 2

    def unk(self) -> int:
        """Number of <unk>."""
        return 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.indices == other.indices

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.indices

    def __getitem__(self, index: int) -> str:
        """The symbol of a number; <unk> for a number past the end."""
        return self.symbols[index] if index < len(self.symbols) else self.symbols[self.unk()]

    def index(self, symbol: str) -> int:
        """The number of a symbol; that of <unk> when it is not known."""
        return self.indices.get(symbol, self.unk())

    def add_symbol(self, symbol: str, n: int = 1, *, overwrite: bool = False) -> int:
        """Count a symbol ``n`` times, adding it when it is new; returns its number.

        Args:
            overwrite: give a known symbol a new number; the old number keeps its position and count.
        """
        known = self.indices.get(symbol)
        if known is not None and not overwrite:
            self.counts[known] += n
            return known
        self.indices[symbol] = len(self.symbols)
        self.symbols.append(symbol)
        self.counts.append(n)
        return len(self.symbols) - 1

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Count many symbols at once."""
        for symbol, n in counts.items():
            self.add_symbol(symbol, n)

    def finalize(self, threshold: int = -1, nwords: int = -1, padding_factor: int = 8) -> None:
        """Order by falling count (ties by code point), cut, and pad the size to a multiple.

        Args:
            threshold: drop symbols that occur less often.
            nwords: largest size before padding, the specials included (as in fairseq); 0 or less for no limit.
            padding_factor: the size becomes a multiple of it by adding ``madeupword0000`` and so on.
        """
        first = self.nspecial
        order = sorted(range(first, len(self.symbols)), key=lambda i: (-self.counts[i], self.symbols[i]))
        kept = max(0, nwords - first) if nwords > 0 else None
        order = [i for i in order[:kept] if self.counts[i] >= threshold]
        self.symbols = self.symbols[:first] + [self.symbols[i] for i in order]
        self.counts = self.counts[:first] + [self.counts[i] for i in order]
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        num_fillers = 0
        while padding_factor > 1 and len(self.symbols) % padding_factor:
            self.add_symbol(f"madeupword{num_fillers:04d}", 0)
            num_fillers += 1

    @classmethod
    def from_counts(
        cls, counts: Counter[str], *, threshold: int = -1, nwords: int = -1, padding_factor: int = 8
    ) -> Dictionary:
        """Make a dictionary of counted symbols; see :meth:`finalize`."""
        dictionary = cls()
        dictionary.add_counts(counts)
        dictionary.finalize(threshold, nwords, padding_factor)
        return dictionary

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dictionary:
        """Read a ``dict.txt``. Raises: ValueError naming file and line when it is malformed."""
        dictionary = cls()
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    dictionary._add_line(raw.decode("utf-8").rstrip())
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{os.fspath(path)}, line {number}: not utf-8 text ({error.reason}); expected 'symbol count' "
                        "on each line, as preprocess.py writes it"
                    ) from error
                except ValueError as error:
                    raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
        if len(dictionary) == dictionary.nspecial:
            raise ValueError(f"{os.fspath(path)} holds no symbol; make a dictionary with preprocess.py --trainpref")
        return dictionary

    def _add_line(self, line: str) -> None:
        symbol, space, count = line.rpartition(" ")
        overwrite = count == _OVERWRITE
        if overwrite:
            symbol, space, count = symbol.rpartition(" ")
        if not (space and symbol and count.removeprefix("-").isdecimal()):
            raise ValueError(f"expected 'symbol count', got {line[:80]!r}; write the file with preprocess.py")
        if symbol in self.indices and not overwrite:
            raise ValueError(
                f"{symbol!r} is a duplicate (of number {self.indices[symbol]}); remove the line, or write "
                f"'{symbol} {count} {_OVERWRITE}' to make it a symbol of its own"
            )
        self.add_symbol(symbol, int(count), overwrite=overwrite)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``dict.txt``, under a temporary name first."""
        with replacing(path) as aside, open(aside, "wb") as file:
            file.write(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of this dictionary's ``dict.txt``."""
        written = set(self.symbols[: self.nspecial])
        lines = []
        for symbol, count in zip(self.symbols[self.nspecial :], self.counts[self.nspecial :]):
            lines.append(f"{symbol} {count} {_OVERWRITE}\n" if symbol in written else f"{symbol} {count}\n")
            written.add(symbol)
        return "".join(lines).encode("utf-8")

    def digest(self) -> str:
        """SHA-256 of the symbols in order; equal if the numbers mean the same symbols."""
        return hashlib.sha256("\n".join(self.symbols).encode("utf-8")).hexdigest()

    def encode_line(
        self,
        line: str,
        line_tokenizer: Callable[[str], list[str]] = str.split,
        add_if_not_exist: bool = True,
        consumer: Callable[[str, int], None] | None = None,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> Tensor:
        """Numbers of a line's symbols, int32 (T,), ended by </s> by default.

        Args:
            line_tokenizer: splits the line; at white space by default.
            add_if_not_exist: unknown symbols become symbols of the dictionary, as in fairseq, instead of <unk>.
            consumer: called with each symbol and its number.
        """
        import torch

        symbols = line_tokenizer(line)
        numbers = [self.add_symbol(s) if add_if_not_exist else self.index(s) for s in symbols]
        if consumer is not None:
            for symbol, number in zip(symbols, numbers):
                consumer(symbol, number)
        numbers = numbers[::-1] if reverse_order else numbers
        return torch.tensor([*numbers, self.eos()] if append_eos else numbers, dtype=torch.int32)

    def string(self, tokens: Any, bpe_symbol: str | None = None) -> str:
        """The text of token numbers, without <s> and </s>; several rows make several lines.

        Args:
            tokens: a tensor, array or sequence of one or two dimensions.
            bpe_symbol: mark that joins pieces of a word, such as "@@ ", or "sentencepiece".
        """
        numbers = np.asarray(tokens, dtype=np.int64)
        if numbers.ndim == 2:
            return "\n".join(self.string(row, bpe_symbol) for row in numbers)
        text = " ".join(self[i] for i in numbers.tolist() if i not in (self.bos(), self.eos()))
        return join_pieces(text, bpe_symbol)


def join_pieces(text: str, bpe_symbol: str | None) -> str:
    """Join word pieces into words."""
    if bpe_symbol is None:
        return text
    if bpe_symbol == "sentencepiece":
        return text.replace(" ", "").replace("\u2581", " ").strip()
    return (text + " ").replace(bpe_symbol, "").rstrip()

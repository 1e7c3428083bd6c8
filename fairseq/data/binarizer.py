"""Text files to token numbers, in as many processes as wanted; the result is the same for any number of them.

A file is cut at line ends into pieces of a fixed size. Lines end with \\n, \\r or \\r\\n, symbols are what white space
separates, and each line, the empty one too, becomes a sentence ended by </s>.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder, best_fitting_dtype

T = TypeVar("T")

PIECE_BYTES = 8 << 20


class Piece(NamedTuple):
    """Some whole lines of a file, as a range of bytes."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class BinarizeReport:
    """Counts of a binarised file."""

    num_sentences: int
    num_tokens: int
    """Tokens written, those that end sentences included."""
    num_replaced: int
    """Tokens the dictionary does not hold, written as <unk>."""


def pieces_of(path: str, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Cut a file after the first line end past every ``piece_bytes`` bytes."""
    size = os.path.getsize(path)
    edges = [0]
    with open(path, "rb") as file:
        while edges[-1] + piece_bytes < size:
            file.seek(edges[-1] + piece_bytes - 1)
            file.readline()
            edges.append(file.tell())
    if edges[-1] < size:
        edges.append(size)
    return [Piece(path, start, end) for start, end in zip(edges, edges[1:])]


def read_piece(piece: Piece) -> str:
    """The text of a piece with every line end as \\n. Raises: ValueError naming the line that is not UTF-8."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        raw = file.read(piece.end - piece.start)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            file.seek(0)
            line = 1 + file.read(piece.start + error.start).count(b"\n")
            raise ValueError(f"{piece.path}, line {line}: not UTF-8 ({error.reason}); convert it with iconv") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def count_piece(piece: Piece) -> Counter[str]:
    """Count of each symbol."""
    return Counter(read_piece(piece).split())


class Encoder:
    """Turns pieces of text into token numbers of a dictionary."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.numbers = dictionary.indices
        self.eos = dictionary.eos()
        self.unk = dictionary.unk()
        self.dtype = best_fitting_dtype(len(dictionary))

    def __call__(self, piece: Piece) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int]:
        """The tokens of all sentences, one after another; the sentences' sizes; how many tokens are replaced."""
        lines = read_piece(piece).split("\n")
        if not lines[-1]:
            lines.pop()  # the text ended with its last line's end
        numbers = _CountingNumbers(self.numbers, self.unk)
        tokens: list[int] = []
        sizes: list[int] = []
        for line in lines:
            symbols = line.split()
            tokens.extend(map(numbers.__getitem__, symbols))
            tokens.append(self.eos)
            sizes.append(len(symbols) + 1)
        return np.array(tokens, dtype=self.dtype), np.array(sizes, dtype=np.int32), numbers.num_unknown


class _CountingNumbers(dict[str, int]):
    """Symbol -> number; counts the look-ups of symbols it has not and answers them with that of <unk>."""

    def __init__(self, numbers: dict[str, int], unk: int) -> None:
        super().__init__(numbers)
        self.unk = unk
        self.num_unknown = 0

    def __missing__(self, symbol: str) -> int:
        self.num_unknown += 1
        return self.unk


def count_symbols(paths: Iterable[str], workers: int = 1) -> Counter[str]:
    """Count of each symbol in these files."""
    counts: Counter[str] = Counter()
    pieces = [piece for path in paths for piece in pieces_of(path)]
    with _mapped(count_piece, pieces, workers) as results:
        for found in results:
            counts.update(found)
    return counts


def binarize(path: str, dictionary: Dictionary, prefix: str, workers: int = 1) -> BinarizeReport:
    """Write a text file as ``prefix.bin`` and ``prefix.idx``; both appear only when they are complete."""
    num_sentences = num_tokens = num_replaced = 0
    encoder = Encoder(dictionary)
    with (
        MMapIndexedDatasetBuilder(prefix + ".bin", encoder.dtype) as builder,
        _mapped(encoder, pieces_of(path), workers) as results,
    ):
        for tokens, sizes, replaced in results:
            builder.add_items(tokens, sizes)
            num_sentences += len(sizes)
            num_tokens += len(tokens)
            num_replaced += replaced
        builder.finalize(prefix + ".idx")
    return BinarizeReport(num_sentences, num_tokens, num_replaced)


@contextmanager
def _mapped(function: Callable[[Piece], T], pieces: list[Piece], workers: int) -> Iterator[Iterator[T]]:
    """The function's results for these pieces, in order, from several processes where that pays."""
    if min(workers, len(pieces)) <= 1:
        yield map(function, pieces)
        return
    # The function travels once per process, not once per piece: an encoder holds a whole dictionary.
    pool = ProcessPoolExecutor(min(workers, len(pieces)), initializer=_keep, initargs=(function,))
    try:
        yield pool.map(_call_kept, pieces)
    finally:
        pool.shutdown(cancel_futures=True)


_kept: list[Callable[[Piece], Any]] = []


def _keep(function: Callable[[Piece], Any]) -> None:
    _kept[:] = [function]


def _call_kept(piece: Piece) -> Any:
    return _kept[0](piece)

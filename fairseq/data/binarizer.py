"""Text files to token numbers, in any number of processes; the result does not depend on that number.

A file is cut at line ends into chunks of a fixed size. Lines end with \\n, \\r or \\r\\n, symbols are separated by
white space, and each line, also an empty one, becomes a sentence ended by </s>.
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

CHUNK_BYTES = 8 << 20


class Chunk(NamedTuple):
    """Complete lines of a file, as a range of bytes."""

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
    """Tokens that are not in the dictionary, written as <unk>."""
    num_padding: int = 0
    """Tokens that the text spells like the padding symbol."""


def find_chunks(path: str, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """Cut a file after the first line end past every ``chunk_bytes`` bytes."""
    size = os.path.getsize(path)
    edges = [0]
    with open(path, "rb") as file:
        while edges[-1] + chunk_bytes < size:
            file.seek(edges[-1] + chunk_bytes - 1)
            file.readline()
            edges.append(file.tell())
    if edges[-1] < size:
        edges.append(size)
    return [Chunk(path, start, end) for start, end in zip(edges, edges[1:])]


def read_chunk(chunk: Chunk) -> str:
    """The text of a chunk with every line end as \\n. Raises: ValueError naming the line that is not UTF-8."""
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        raw = file.read(chunk.end - chunk.start)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            file.seek(0)
            line = 1 + file.read(chunk.start + error.start).count(b"\n")
            raise ValueError(f"{chunk.path}, line {line}: not UTF-8 ({error.reason}); convert it with iconv") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def count_chunk(chunk: Chunk) -> Counter[str]:
    """Count of each symbol."""
    return Counter(read_chunk(chunk).split())


class Encoder:
    """Turns chunks of text into token numbers of a dictionary."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.numbers = dictionary.indices
        self.eos = dictionary.eos()
        self.unk = dictionary.unk()
        self.dtype = best_fitting_dtype(len(dictionary))

    def __call__(self, chunk: Chunk) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int]:
        """The tokens of all sentences, concatenated; the sentences' sizes; the number of tokens replaced."""
        lines = read_chunk(chunk).split("\n")
        if not lines[-1]:
            lines.pop()  # the text ended with a line end
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
    """Symbol -> number; counts look-ups of unknown symbols and returns the number of <unk> for them."""

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
    chunks = [chunk for path in paths for chunk in find_chunks(path)]
    with _map_in_processes(count_chunk, chunks, workers) as results:
        for chunk_counts in results:
            counts.update(chunk_counts)
    return counts


def binarize(path: str, dictionary: Dictionary, prefix: str, workers: int = 1) -> BinarizeReport:
    """Write a text file as ``prefix.bin`` and ``prefix.idx``; both appear only once they are complete."""
    num_sentences = num_tokens = num_replaced = num_padding = 0
    encoder = Encoder(dictionary)
    with (
        MMapIndexedDatasetBuilder(prefix + ".bin", encoder.dtype) as builder,
        _map_in_processes(encoder, find_chunks(path), workers) as results,
    ):
        for tokens, sizes, replaced in results:
            builder.add_items(tokens, sizes)
            num_sentences += len(sizes)
            num_tokens += len(tokens)
            num_replaced += replaced
            num_padding += int((tokens == dictionary.pad()).sum())
        builder.finalize(prefix + ".idx")
    return BinarizeReport(num_sentences, num_tokens, num_replaced, num_padding)


@contextmanager
def _map_in_processes(function: Callable[[Chunk], T], chunks: list[Chunk], workers: int) -> Iterator[Iterator[T]]:
    """Map a function over chunks, in order, in several processes if there is more than one chunk."""
    if min(workers, len(chunks)) <= 1:
        yield map(function, chunks)
        return
    # The function travels once per process, not once per chunk: an encoder holds a whole dictionary.
    pool = ProcessPoolExecutor(min(workers, len(chunks)), initializer=_set_worker_function, initargs=(function,))
    try:
        yield pool.map(_call_worker_function, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


_worker_function: list[Callable[[Chunk], Any]] = []


def _set_worker_function(function: Callable[[Chunk], Any]) -> None:
    _worker_function[:] = [function]


def _call_worker_function(chunk: Chunk) -> Any:
    return _worker_function[0](chunk)

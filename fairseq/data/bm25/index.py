"""BM25 over segments with bm25s: an index on disk, and exact search for whole segments.

bm25s tokenises, weighs and stores: its index holds for each term the documents it is in and its BM25 weight in each
(Lucene's formula with k1 0.9 and b 0.4, pyserini's defaults; words in lower case without Lucene's English stop words).
It scores one query at a time and one token after another, which for segments of 3,072 tokens takes a quarter of a
second each at 35,000 documents. Most of that goes to words that are in many documents. Here the weights of those are a
dense matrix, multiplied with the counts of many queries at once; the short lists of all other words are added up.

Shapes: D documents, F frequent terms, Q queries, C candidates.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq.data.segments import file_sha256, read_segments
from fairseq.runtime.files import locked, read_json, write_json

logger = logging.getLogger(__name__)
Numbers = npt.NDArray[np.int64]

SCORING: dict[str, Any] = {"method": "lucene", "k1": 0.9, "b": 0.4}
_ABOUT = "about.json"
_QUERIES_AT_ONCE = 64
# A term in more than this share of the documents is frequent, as far as the matrix stays below so many bytes.
_FREQUENT_SHARE = 0.04
_FREQUENT_BYTES = 1 << 30
# Candidates come from float32 sums in whatever order is fastest; so many more than asked for are summed in float64.
_SPARE = 12
_LOG_SECONDS = 20.0
_WAIT_SECONDS = 2.0


class Bm25Index:
    """An index that is ready to be searched."""

    queries_at_once = _QUERIES_AT_ONCE
    """Queries worth a matrix product of their own; more only take memory."""

    def __init__(self, retriever: Any, segments_sha256: str) -> None:
        """Take over a ``bm25s.BM25`` built of the segments file with this digest."""
        self.segments_sha256 = segments_sha256
        self.num_documents = int(retriever.scores["num_docs"])
        self._numbers: dict[str, int] = retriever.vocab_dict
        self._split: Callable[[str], list[str]] = _tokenizer().splitter
        # np.asarray: a slice of a memmap is made ten times as slowly as one of an array.
        self._documents, self._weights, self._starts = (
            np.asarray(retriever.scores[name]) for name in ("indices", "data", "indptr")
        )
        lengths = np.diff(self._starts)
        limit = int((lengths > self.num_documents * _FREQUENT_SHARE).sum())
        limit = min(limit, _FREQUENT_BYTES // (4 * self.num_documents))
        frequent = np.argsort(-lengths, kind="stable")[:limit]
        self._row = np.full(len(lengths), -1)
        self._row[frequent] = np.arange(limit)
        self._weights_FD = np.zeros((limit, self.num_documents), dtype=np.float32)
        for row, (start, end) in enumerate(self._places(frequent)):
            self._weights_FD[row, self._documents[start:end]] = self._weights[start:end]

    def _places(self, terms: Numbers) -> Iterator[tuple[int, int]]:
        """Bounds of the documents and weights of each term."""
        return zip(self._starts[terms].tolist(), self._starts[terms + 1].tolist())

    def _terms(self, text: str) -> tuple[Numbers, Numbers]:
        """The known words of a text, as numbers, and how often each occurs."""
        words = Counter(self._split(text.lower()))
        known = [(self._numbers[word], count) for word, count in words.items() if word in self._numbers]
        terms_and_counts = np.array(known, dtype=np.int64).reshape(-1, 2)
        return terms_and_counts[:, 0], terms_and_counts[:, 1]

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """The best documents for each of ``texts``, which are documents ``first``, ``first + 1``, ... themselves.

        Best first, equal ones by number, never the document itself, none without a word in common.
        """
        queries = [self._terms(text) for text in texts]
        counts_QF = np.zeros((len(queries), len(self._weights_FD)), dtype=np.float32)
        for query, (terms, counts) in enumerate(queries):
            rows = self._row[terms]
            counts_QF[query, rows[rows >= 0]] = counts[rows >= 0]
        scores_QD = torch.from_numpy(counts_QF) @ torch.from_numpy(self._weights_FD)
        return [
            self._ranked(terms, counts, scores_QD[query], first + query, num_neighbors)
            for query, (terms, counts) in enumerate(queries)
        ]

    def _ranked(
        self,
        terms: Numbers,
        counts: Numbers,
        frequent_D: Tensor,
        own: int,
        num_neighbors: int,
    ) -> list[int]:
        """The best documents of one query, given its score so far: that of the frequent terms."""
        rows = self._row[terms]
        rare_D = self._score_of_rare(terms[rows < 0], counts[rows < 0])
        scores_D = frequent_D + torch.from_numpy(rare_D)
        scores_D[own] = -torch.inf
        candidates_C = scores_D.topk(min(num_neighbors + _SPARE, self.num_documents)).indices.numpy()
        candidates_C = candidates_C[candidates_C != own]
        # Products and sums row by row, and no matrix product: that may round equal documents differently.
        weights_CF = self._weights_FD[rows[rows >= 0], candidates_C[:, None]].astype(np.float64)
        scores_C = rare_D[candidates_C] + (weights_CF * counts[rows >= 0]).sum(axis=1)
        best = np.lexsort((candidates_C, -scores_C))[:num_neighbors]
        ranked: list[int] = candidates_C[best[scores_C[best] > 0]].tolist()
        return ranked

    def _score_of_rare(self, terms: Numbers, counts: Numbers) -> npt.NDArray[np.float64]:
        if not len(terms):
            return np.zeros(self.num_documents)
        places = list(self._places(terms))
        documents = np.concatenate([self._documents[start:end] for start, end in places])
        weights = np.concatenate([self._weights[start:end] for start, end in places])
        times = np.repeat(counts, [end - start for start, end in places])
        scores = np.bincount(documents, weights * times, minlength=self.num_documents)
        return scores.astype(np.float64, copy=False)


def open_index(folder: Path, segments_path: Path) -> Bm25Index:
    """Read the index of a segments file, building it when the folder is missing or empty.

    Raises: ValueError when the folder holds something else, or the index of other segments.
    """
    digest = file_sha256(segments_path)
    if not _is_filled(folder):
        with _in_turn(folder.with_name(folder.name + ".lock")):
            if not _is_filled(folder):
                _build(folder, segments_path, digest)
    about_path = folder / _ABOUT
    if not about_path.exists():
        raise ValueError(f"{str(folder)!r} holds something that is no index of ours; give another --index_path")
    about = read_json(about_path)
    if about["sha256"] != digest:
        raise ValueError(
            f"index {str(folder)!r} was built of other segments ({about['num_segments']} of them, {about['path']}, "
            f"sha256 {about['sha256'][:12]}) than {str(segments_path)!r} (sha256 {digest[:12]}); remove the folder to "
            "build it again, or give another --index_path"
        )
    return Bm25Index(_bm25s().BM25.load(folder, mmap=True), digest)


def _is_filled(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


@contextmanager
def _in_turn(lock: Path) -> Iterator[None]:
    """Wait for whoever else is building the index: shards are often started together."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(lock, "the index"))
                break
            except OSError:
                if not lock.exists():
                    raise
            logger.info("waiting for the process that builds the index")
            time.sleep(_WAIT_SECONDS)
        yield


def _build(folder: Path, segments_path: Path, digest: str) -> None:
    started = time.perf_counter()
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = _tokenizer()
    terms = list(tokenizer.streaming_tokenize(_told(read_segments(segments_path)), allow_empty=False))
    if not tokenizer.word_to_id:
        raise ValueError(f"{str(segments_path)!r} holds {len(terms)} segments and no word that could be searched for")
    retriever = _bm25s().BM25(**SCORING)
    retriever.index((terms, tokenizer.word_to_id), create_empty_token=False, show_progress=False)
    retriever.save(aside)
    about = {"path": str(segments_path), "sha256": digest, "num_segments": len(terms)}
    write_json(aside / _ABOUT, about)
    aside.replace(folder)
    logger.info("indexed %d segments in %.0fs: %s", len(terms), time.perf_counter() - started, folder)


def _told(texts: Iterable[str]) -> Iterable[str]:
    """The same texts, with a line in the log now and then."""
    spoke = time.perf_counter()
    for count, text in enumerate(texts):
        if time.perf_counter() - spoke > _LOG_SECONDS:
            spoke = time.perf_counter()
            logger.info("indexing: read %d segments", count)
        yield text


def _bm25s() -> Any:
    import bm25s  # type: ignore[import-untyped]

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
    return bm25s


def _tokenizer() -> Any:
    return _bm25s().tokenization.Tokenizer(stopwords="en")

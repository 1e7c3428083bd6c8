"""BM25 over segments with bm25s: an index on disk, and exact search for whole segments.

bm25s tokenises, computes the weights and stores them: its index holds the documents of each term and its BM25 weight
in each (Lucene's formula with k1 0.9 and b 0.4, pyserini's defaults; lower-case words without Lucene's English stop
words). It scores one query at a time and token by token, which for segments of 3,072 tokens takes a quarter of a
second each at 35,000 documents, mostly spent on words that occur in many documents. This module keeps the weights of
those words as a dense matrix, multiplied with the counts of many queries at once; the short lists of all other words
are summed.

Shapes: D documents, F frequent terms, Q queries, C candidates.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq.data.segments import file_sha256, read_segments
from fairseq.runtime.file_marks import MARK, differs, file_mark
from fairseq.runtime.files import LockedError, locked, write_json
from fairseq.runtime.records import TEXT, WHOLE, Entries, Fields, read_record, seal

logger = logging.getLogger(__name__)
Numbers = npt.NDArray[np.int64]

SCORING: dict[str, Any] = {"method": "lucene", "k1": 0.9, "b": 0.4}
_METADATA_FILE = "about.json"
_WAY_OUT = "copy the folder again, or remove it and run bm25_search.py to build it again"
ABOUT = Fields({"path": TEXT, "sha256": TEXT, "num_segments": WHOLE}, {"files": Entries(MARK)})
"""``about.json`` of an index."""
_BATCH_QUERIES = 64
# A term in more than this share of the documents is frequent, as long as the matrix stays below this many bytes.
_FREQUENT_SHARE = 0.04
_FREQUENT_BYTES = 1 << 30
# Candidates come from float32 sums in the fastest order; this many more than requested are summed again in float64.
_EXTRA_CANDIDATES = 12
_LOG_SECONDS = 20.0
_WAIT_SECONDS = 2.0


class Bm25Index:
    """A BM25 index opened for search."""

    queries_at_once = _BATCH_QUERIES
    """Queries per matrix product; more only take memory."""

    def __init__(self, retriever: Any, segments_sha256: str) -> None:
        """Wrap a ``bm25s.BM25`` built from the segments file with this digest."""
        self.segments_sha256 = segments_sha256
        self.num_documents = int(retriever.scores["num_docs"])
        self._term_ids: dict[str, int] = retriever.vocab_dict
        self._tokenize: Callable[[str], list[str]] = _tokenizer().splitter
        # np.asarray: slicing a memmap is ten times as slow as slicing an array.
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
        for row, (start, end) in enumerate(self._bounds(frequent)):
            self._weights_FD[row, self._documents[start:end]] = self._weights[start:end]

    def _bounds(self, terms: Numbers) -> Iterator[tuple[int, int]]:
        """Bounds of the documents and weights of each term."""
        return zip(self._starts[terms].tolist(), self._starts[terms + 1].tolist())

    def _terms(self, text: str) -> tuple[Numbers, Numbers]:
        """The known words of a text, as numbers, and the count of each."""
        words = Counter(self._tokenize(text.lower()))
        number_of = self._term_ids.get
        known = {number: count for word, count in words.items() if (number := number_of(word)) is not None}
        terms, counts = (np.fromiter(numbers, np.int64, len(known)) for numbers in (known.keys(), known.values()))
        return terms, counts

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """The best documents for each of ``texts``, which are documents ``first``, ``first + 1``, ... themselves.

        Best first, ties by number; never the document itself, nor one without a word in common.
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
        """The best documents of one query, given the scores of its frequent terms."""
        rows = self._row[terms]
        rare_D = self._score_of_rare(terms[rows < 0], counts[rows < 0])
        scores_D = frequent_D + torch.from_numpy(rare_D)
        scores_D[own] = -torch.inf
        candidates_C = scores_D.topk(min(num_neighbors + _EXTRA_CANDIDATES, self.num_documents)).indices.numpy()
        candidates_C = candidates_C[candidates_C != own]
        # Products and sums per row instead of a matrix product, which may round equal documents differently.
        weights_CF = self._weights_FD[rows[rows >= 0], candidates_C[:, None]].astype(np.float64)
        scores_C = rare_D[candidates_C] + (weights_CF * counts[rows >= 0]).sum(axis=1)
        best = np.lexsort((candidates_C, -scores_C))[:num_neighbors]
        ranked: list[int] = candidates_C[best[scores_C[best] > 0]].tolist()
        return ranked

    def _score_of_rare(self, terms: Numbers, counts: Numbers) -> npt.NDArray[np.float64]:
        if not len(terms):
            return np.zeros(self.num_documents)
        # Places of all entries at once: a slice for each of hundreds of short lists takes three times as long.
        starts = self._starts[terms]
        lengths = self._starts[terms + 1] - starts
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        weights = self._weights[places] * np.repeat(counts, lengths)
        scores = np.bincount(self._documents[places], weights, minlength=self.num_documents)
        return scores.astype(np.float64, copy=False)


def open_index(folder: Path, segments_path: Path) -> Bm25Index:
    """Open the index of a segments file, building it if the folder is missing or empty.

    Raises: ValueError when the folder holds something else, or the index of other segments.
    """
    digest = file_sha256(segments_path)
    if not _is_filled(folder):
        with _wait_for_lock(folder.with_name(folder.name + ".lock")):
            if not _is_filled(folder):
                _build(folder, segments_path, digest)
    metadata_path = folder / _METADATA_FILE
    if not metadata_path.exists():
        raise ValueError(f"{str(folder)!r} is not an index of bm25_search.py; give another --index_path")
    metadata = read_record(metadata_path, ABOUT, _WAY_OUT)
    if metadata["sha256"] != digest:
        raise ValueError(
            f"index {str(folder)!r} was built from other segments ({metadata['num_segments']} of them, "
            f"{metadata['path']}, sha256 {metadata['sha256'][:12]}) than {str(segments_path)!r} (sha256 "
            f"{digest[:12]}); remove the folder to rebuild it, or give another --index_path"
        )
    require_undamaged(folder, metadata, whole=False)
    return Bm25Index(_loaded(folder), digest)


def require_undamaged(folder: Path, metadata: Mapping[str, Any], *, whole: bool) -> None:
    """Compare the files of an index with their marks; an index of an earlier release has none.

    Args:
        whole: compare every block; otherwise those of files of at most 64 MiB, and the ends of longer ones.
    Raises: ValueError naming the file that is missing or differs.
    """
    for name, mark in metadata.get("files", {}).items():
        path = folder / name
        difference = differs(path, mark, whole=whole) if path.is_file() else "it is missing"
        if difference is not None:
            raise ValueError(f"{path} is damaged ({difference}); {_WAY_OUT}")


def verify_index(folder: Path) -> bool:
    """Compare every file of an index with its mark; False for an index of an earlier release, which has none.

    Raises: ValueError naming the file that is missing or differs.
    """
    metadata = read_record(folder / _METADATA_FILE, ABOUT, _WAY_OUT)
    require_undamaged(folder, metadata, whole=True)
    return "files" in metadata


def _loaded(folder: Path) -> Any:
    """The index as bm25s reads it. Raises: ValueError naming the folder when a file is damaged or missing."""
    try:
        retriever = _bm25s().BM25.load(folder, mmap=True)
        held = {name: retriever.scores[name] for name in ("indices", "data", "indptr")}
        starts, count = np.asarray(held["indptr"]), int(retriever.scores["num_docs"])
        documents = np.asarray(held["indices"])
        fits = len(starts) > 1 and starts[0] == 0 and starts[-1] == len(documents) == len(held["data"])
        fits &= bool((np.diff(starts) >= 0).all()) and (not len(documents) or documents.min() >= 0)
        terms = list(retriever.vocab_dict.values())
        if not fits or documents.max(initial=0) >= count or not all(0 <= t < len(starts) - 1 for t in terms):
            raise ValueError("its arrays contradict each other")
    except Exception as error:  # bm25s reads JSON and arrays unchecked, which can fail in any way
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"index {str(folder)!r} is damaged ({reason}); {_WAY_OUT}") from None
    return retriever


def _is_filled(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


@contextmanager
def _wait_for_lock(lock: Path) -> Iterator[None]:
    """Hold the lock of the build, waiting for another process that builds: shards are often started together."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as lock_stack:
        while True:
            try:
                lock_stack.enter_context(locked(lock, "the index"))
                break
            except LockedError:
                pass
            logger.info("waiting for the process that builds the index")
            time.sleep(_WAIT_SECONDS)
        yield


def _build(folder: Path, segments_path: Path, digest: str) -> None:
    started = time.perf_counter()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = _tokenizer()
    terms = list(tokenizer.streaming_tokenize(_with_progress(read_segments(segments_path)), allow_empty=False))
    if not tokenizer.word_to_id:
        raise ValueError(
            f"{str(segments_path)!r} holds {len(terms)} segments and no searchable word; give another --segments_path"
        )
    retriever = _bm25s().BM25(**SCORING)
    retriever.index((terms, tokenizer.word_to_id), create_empty_token=False, show_progress=False)
    retriever.save(temporary)
    metadata: dict[str, Any] = {"path": str(segments_path), "sha256": digest, "num_segments": len(terms)}
    metadata["files"] = {path.name: file_mark(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / _METADATA_FILE, seal(metadata))
    temporary.replace(folder)
    logger.info("indexed %d segments in %.0fs: %s", len(terms), time.perf_counter() - started, folder)


def _with_progress(texts: Iterable[str]) -> Iterable[str]:
    """The same texts, with a log line every ``_LOG_SECONDS``."""
    logged = time.perf_counter()
    for count, text in enumerate(texts):
        if time.perf_counter() - logged > _LOG_SECONDS:
            logged = time.perf_counter()
            logger.info("indexing: read %d segments", count)
        yield text


def _bm25s() -> Any:
    import bm25s  # type: ignore[import-untyped]

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
    return bm25s


def _tokenizer() -> Any:
    return _bm25s().tokenization.Tokenizer(stopwords="en")

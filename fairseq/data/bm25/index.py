"""BM25 over segments with bm25s: an index on disk, and exact search for whole segments.

bm25s tokenises, computes the weights and stores them: its index holds the documents of each term and its BM25 weight
in each (Lucene's formula with k1 0.9 and b 0.4, pyserini's defaults; lower-case words without Lucene's English stop
words). It adds every posting of every token of a query. Here a term's postings are added once, those of the terms first
that tell documents apart; what the others can add at most is known, so that most queries end with a few documents to
be scored by themselves, and words that occur everywhere are hardly ever read.

Shapes: V terms, D documents, P postings, T terms of a query, C candidates.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.data.segments import file_sha256, read_segments
from fairseq.runtime.file_marks import MARK, differs, file_mark
from fairseq.runtime.files import LockedError, locked, write_json
from fairseq.runtime.records import TEXT, WHOLE, Entries, Fields, read_record, seal
from fairseq.runtime.threads import ObjectPool, map_in_threads

logger = logging.getLogger(__name__)
Numbers = npt.NDArray[np.int64]

SCORING: dict[str, Any] = {"method": "lucene", "k1": 0.9, "b": 0.4}
_METADATA_FILE = "about.json"
_WAY_OUT = "copy the folder again, or remove it and run bm25_search.py to build it again"
ABOUT = Fields({"path": TEXT, "sha256": TEXT, "num_segments": WHOLE}, {"files": Entries(MARK)})
"""``about.json`` of an index."""
_BATCH_QUERIES = 64
_SPACES = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) == "_")}
_LOG_SECONDS = 20.0
_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class _Room:
    """Memory for one query at a time."""

    score_D: npt.NDArray[np.float32]
    candidate_D: npt.NDArray[np.int32]
    count_V: npt.NDArray[np.float32]


class Bm25Index:
    """A BM25 index opened for search."""

    queries_at_once = _BATCH_QUERIES
    """Queries that threads share; more only take memory."""

    def __init__(self, retriever: Any, segments_sha256: str) -> None:
        """Wrap a ``bm25s.BM25`` built from the segments file with this digest."""
        from fairseq.data.bm25 import kernels

        self._kernels = kernels
        self.segments_sha256 = segments_sha256
        self.num_documents = int(retriever.scores["num_docs"])
        self._term_ids: dict[str, int] = retriever.vocab_dict
        self._tokenize: Callable[[str], list[str]] = _tokenizer().splitter
        given, types = retriever.scores, {"indices": np.int32, "data": np.float32, "indptr": np.int64}
        self._document_P, self._weight_P, self._starts_V = (np.array(given[name], types[name]) for name in types)
        counts_D = np.bincount(self._document_P, minlength=self.num_documents)
        self._starts_D = np.concatenate([[0], np.cumsum(counts_D)])
        self._term_P, self._own_weight_P = np.empty_like(self._document_P), np.empty_like(self._weight_P)
        kernels.transpose(
            self._starts_V, self._document_P, self._weight_P, self._starts_D[:-1].copy(), self._term_P,
            self._own_weight_P,
        )  # fmt: skip
        self._length_V = np.diff(self._starts_V)
        self._largest_V = np.zeros(len(self._length_V))
        filled = self._length_V > 0
        self._largest_V[filled] = np.maximum.reduceat(self._weight_P, self._starts_V[:-1][filled])
        self._rooms = ObjectPool(self._make_room)

    def _make_room(self) -> _Room:
        return _Room(
            np.empty(self.num_documents, np.float32),
            np.empty(self.num_documents, np.int32),
            np.zeros(len(self._length_V), np.float32),
        )

    def _terms(self, text: str) -> tuple[Numbers, npt.NDArray[np.float64]]:
        """The known words of a text, as numbers, and the count of each."""
        counts = Counter(_words(text.lower(), self._tokenize))
        term_T = np.fromiter(map(self._term_ids.get, counts, repeat(-1)), np.int64, len(counts))
        count_T = np.fromiter(counts.values(), np.float64, len(counts))
        return term_T[term_T >= 0], count_T[term_T >= 0]

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """The best documents for each of ``texts``, which are documents ``first``, ``first + 1``, ... themselves.

        Best first, ties by number; never the document itself, nor one without a word in common.
        """
        return list(map_in_threads(lambda task: self._best(*task, num_neighbors), list(enumerate(texts, first))))

    def _best(self, own: int, text: str, num_neighbors: int) -> list[int]:
        """The best documents of one query."""
        term_T, count_T = self._terms(text)
        bound_T = count_T * self._largest_V[term_T]
        order_T = np.argsort(-bound_T / np.maximum(self._length_V[term_T], 1), kind="stable")
        term_T, count_T, bound_T = term_T[order_T], count_T[order_T], bound_T[order_T]
        with self._rooms.borrow() as room:
            count = self._kernels.candidates(
                self._starts_V, self._document_P, self._weight_P, term_T, count_T, bound_T, own, num_neighbors,
                room.score_D, room.candidate_D,
            )  # fmt: skip
            candidate_C, score_C = room.candidate_D[:count].copy(), np.empty(count)
            self._kernels.score(
                self._starts_D, self._term_P, self._own_weight_P, term_T, count_T, candidate_C, room.count_V, score_C
            )
        best = np.lexsort((candidate_C, -score_C))[:num_neighbors]
        ranked: list[int] = candidate_C[best[score_C[best] > 0]].tolist()
        return ranked


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


def _words(text: str, tokenize: Callable[[str], list[str]]) -> list[str]:
    """Words of a query, with some that no index holds: those of one letter.

    Where bm25s' words, runs of at least two letters, are found without its regular expression, that takes a third of
    the time.
    """
    return text.translate(_SPACES).split() if text.isascii() else tokenize(text)


def _bm25s() -> Any:
    import bm25s  # type: ignore[import-untyped]

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG when it is imported
    return bm25s


def _tokenizer() -> Any:
    return _bm25s().tokenization.Tokenizer(stopwords="en")

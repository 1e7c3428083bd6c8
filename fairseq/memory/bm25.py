"""BM25 over segments with bm25s: an index on disk, and exact search for whole segments.

bm25s tokenises, weighs and stores: its index is a sparse matrix of BM25 weights, documents by terms (Lucene's formula
with k1 0.9 and b 0.4, pyserini's defaults; words in lower case without Lucene's English stop words). It scores one
query at a time and one token after another, which for queries of thousands of tokens takes a quarter of a second each
at 35,000 documents. Here scores are products of that matrix with the term counts of many queries: 40 times faster.

Shapes: D documents, V terms, Q queries, C candidates.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairseq.data.segments import file_sha256, read_segments
from fairseq.memory.files import locked, read_json, write_json

logger = logging.getLogger(__name__)

SCORING: dict[str, Any] = {"method": "lucene", "k1": 0.9, "b": 0.4}
_ABOUT = "about.json"
# Fewer queries use the memory bandwidth badly, more of them outgrow the processor's cache.
_QUERIES_AT_ONCE = 64
# Scores are float32 sums in whatever order is fastest; this many more than asked for are summed again in float64.
_SPARE = 12
_LOG_SECONDS = 20.0
_WAIT_SECONDS = 2.0


class Bm25Index:
    """An index that is ready to be searched."""

    queries_at_once = _QUERIES_AT_ONCE
    """Queries that are fastest to search together; more are an error."""

    def __init__(self, retriever: Any, segments_sha256: str) -> None:
        """Take over a ``bm25s.BM25`` built of the segments file with this digest."""
        self.segments_sha256 = segments_sha256
        self._tokenizer = _tokenizer()
        self._tokenizer.word_to_id = retriever.vocab_dict
        self._weights_DV = _by_document(retriever.scores)
        self._counts_VQ = torch.zeros(self._weights_DV.shape[1], _QUERIES_AT_ONCE)

    @property
    def num_documents(self) -> int:
        """Documents in the index."""
        return int(self._weights_DV.shape[0])

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """The best documents for each of ``texts``, which are documents ``first``, ``first + 1``, ... themselves.

        Best first, equal ones by number, never the document itself, none without a word in common.
        """
        terms = list(self._tokenizer.streaming_tokenize(texts, update_vocab=False, allow_empty=False))
        counts_VQ = self._counts_VQ.zero_()
        for query, numbers in enumerate(terms):
            found, times = np.unique(np.array(numbers, dtype=np.int64), return_counts=True)
            counts_VQ[torch.from_numpy(found), query] = torch.from_numpy(times).float()
        scores_QD = (self._weights_DV @ counts_VQ).T[: len(texts)].contiguous()
        own_Q = torch.arange(len(texts))
        scores_QD[own_Q, own_Q + first] = -torch.inf
        candidates_QC = scores_QD.topk(min(num_neighbors + _SPARE, self.num_documents)).indices.numpy()
        counts_QV = counts_VQ.T.numpy()
        return [
            self._ranked(candidates_QC[query], counts_QV[query], first + query, num_neighbors)
            for query in range(len(texts))
        ]

    def _ranked(
        self, candidates_C: npt.NDArray[np.int64], counts_V: npt.NDArray[np.float32], own: int, num_neighbors: int
    ) -> list[int]:
        starts_D, terms, weights = (
            part.numpy()
            for part in (
                self._weights_DV.crow_indices(),
                self._weights_DV.col_indices(),
                self._weights_DV.values(),
            )
        )
        candidates_C = candidates_C[candidates_C != own]
        starts_C = starts_D[candidates_C].astype(np.int64)
        lengths_C = starts_D[candidates_C + 1] - starts_C
        which = np.repeat(np.arange(len(candidates_C)), lengths_C)
        places = np.arange(len(which)) + np.repeat(starts_C - np.cumsum(lengths_C) + lengths_C, lengths_C)
        parts = weights[places].astype(np.float64) * counts_V[terms[places]]
        scores_C = np.bincount(which, parts, minlength=len(candidates_C))
        best = np.lexsort((candidates_C, -scores_C))[:num_neighbors]
        ranked: list[int] = candidates_C[best[scores_C[best] > 0]].tolist()
        return ranked


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
            "build it anew, or give another --index_path"
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


def _by_document(scores: dict[str, Any]) -> Tensor:
    """The weights of bm25s' index, which lie term after term, as a matrix that lies document after document."""
    num_documents = int(scores["num_docs"])
    documents, starts_V = np.asarray(scores["indices"]), np.asarray(scores["indptr"])
    if len(documents) > np.iinfo(np.int32).max:
        raise ValueError(f"the index has {len(documents)} postings, more than 32-bit numbers reach; use pyserini")
    num_terms = len(starts_V) - 1
    terms = np.repeat(np.arange(num_terms, dtype=np.int32), np.diff(starts_V))
    order = np.argsort(documents, kind="stable")
    starts_D = np.concatenate([[0], np.cumsum(np.bincount(documents, minlength=num_documents))])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse")  # torch calls the layout beta
        # 32-bit numbers: with 64-bit ones the product takes two to four times as long (torch 2.13 with MKL).
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts_D.astype(np.int32)),
            torch.from_numpy(terms[order]),
            torch.from_numpy(np.asarray(scores["data"])[order]),
            size=(num_documents, num_terms),
            check_invariants=False,
        )

"""BM25 over segments with pyserini: searches a Lucene index that ``python -m pyserini.index.lucene`` built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq.data.segments import file_sha256, read_segments

_COMMIT_PREFIX = "segments_"  # Lucene's commit points are called segments_1, segments_2, ...


def is_lucene_index(folder: Path) -> bool:
    """True if the folder holds a Lucene index."""
    return folder.is_dir() and any(path.name.startswith(_COMMIT_PREFIX) for path in folder.iterdir())


class LuceneIndex:
    """A Lucene index with the interface of :class:`fairseq.data.bm25.index.Bm25Index`."""

    queries_at_once = 64
    """Queries per call of pyserini."""

    def __init__(self, folder: Path, segments_path: Path) -> None:
        """Open the index of these segments.

        Raises: ValueError when it does not exist, pyserini is missing, or the number of segments differs.
        """
        if not is_lucene_index(folder):
            raise ValueError(
                f"{str(folder)!r} holds no Lucene index; build one (python -m pyserini.index.lucene --collection "
                f"JsonCollection --input {str(segments_path.parent)!r} --index {str(folder)!r} --generator "
                "DefaultLuceneDocumentGenerator --threads 1) or drop --backend pyserini"
            )
        self._searcher = _searcher(folder)
        self.num_documents = int(self._searcher.num_docs)
        num_segments = sum(1 for _ in read_segments(segments_path))
        if num_segments != self.num_documents:
            raise ValueError(
                f"the Lucene index {str(folder)!r} holds {self.num_documents} documents, {str(segments_path)!r} "
                f"{num_segments} segments; rebuild the index from a folder that holds only this file"
            )
        self.segments_sha256 = file_sha256(segments_path)

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """See :meth:`fairseq.data.bm25.index.Bm25Index.search`."""
        names = [str(first + query) for query in range(len(texts))]
        hits = self._searcher.batch_search(list(texts), names, k=num_neighbors + 1, threads=os.cpu_count() or 1)
        documents = ([int(hit.docid) for hit in hits.get(name) or ()] for name in names)
        return [
            [document for document in ranked if document != first + query][:num_neighbors]
            for query, ranked in enumerate(documents)
        ]


@contextmanager
def _some_openai_key() -> Iterator[None]:
    """Give OPENAI_API_KEY some value: pyserini 1.6 makes an OpenAI client on import, and needs no key."""
    before = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = before or "not-used"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPENAI_API_KEY"]
        else:
            os.environ["OPENAI_API_KEY"] = before


def _searcher(folder: Path) -> Any:
    try:
        with _some_openai_key():
            from pyserini.search.lucene import LuceneSearcher  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:  # without a suitable Java, jnius fails with errors of its own
        raise ValueError(
            f"{str(folder)!r} is a Lucene index and pyserini cannot be loaded ({type(error).__name__}: {error}); pip "
            "install 'fairseq-memory[pyserini]' and the Java version it requires, or give an --index_path "
            "without index for bm25s, which needs neither"
        ) from error
    from jnius import autoclass  # type: ignore[import-not-found, unused-ignore]

    # Each distinct word of a query is a clause, and Lucene rejects more than 1024 by default.
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(1 << 20)
    return LuceneSearcher(str(folder))

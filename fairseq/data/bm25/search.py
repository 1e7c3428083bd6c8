"""Search for the neighbours of a shard of the segments; an interrupted search resumes."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fairseq.data.bm25.config import SearchConfig
from fairseq.data.bm25.lucene import LuceneIndex, is_lucene_index
from fairseq.data.bm25.results import ShardWriter
from fairseq.data.segments import read_segments
from fairseq.runtime.files import locked, may_create_in

logger = logging.getLogger(__name__)
_LOG_SECONDS = 20.0


class SegmentIndex(Protocol):
    """The interface of search backends."""

    queries_at_once: int
    segments_sha256: str

    @property
    def num_documents(self) -> int:
        """Documents in the index."""

    def search(self, texts: Sequence[str], first: int, num_neighbors: int) -> list[list[int]]:
        """Neighbours of texts, which are the documents ``first``, ``first + 1``, ..."""


@dataclass(frozen=True)
class SearchReport:
    """Summary of a search."""

    path: Path
    num_segments: int
    """Segments of the shard."""
    num_searched: int
    """Segments searched by this run; an earlier run did the others."""
    index_seconds: float
    search_seconds: float


def search_shard(config: SearchConfig) -> SearchReport:
    """Find the neighbours of a shard's segments. Raises: ValueError or OSError for impossible settings or files."""
    segments_path, folder, results = (
        Path(path) for path in (config.segments_path, config.index_path, config.results_path)
    )
    started = time.perf_counter()
    backend = backend_of(config)
    may_create_in(results)
    index = _open(backend, folder, segments_path)
    opened = time.perf_counter()
    count = index.num_documents
    start, stop = (count * shard // config.num_shards for shard in (config.shard_id, config.shard_id + 1))
    search = {
        "segments_sha256": index.segments_sha256,
        "num_segments": count,
        "num_shards": config.num_shards,
        "num_neighbors": config.num_neighbors,
        "backend": backend,
    }
    with locked(results / f"shard{config.shard_id}.lock", f"shard {config.shard_id}"):
        writer = ShardWriter(results, config.shard_id, search)
        if writer.complete:
            logger.info("%s is complete already; remove it to search again", writer.path)
            return SearchReport(writer.path, stop - start, 0, opened - started, 0.0)
        if writer.num_done:
            logger.info("resuming at segment %d of %d to %d", start + writer.num_done, start, stop - 1)
        first = start + writer.num_done
        _search(index, segments_path, writer, first, stop, config.num_neighbors)
        writer.finish()
    return SearchReport(writer.path, stop - start, stop - first, opened - started, time.perf_counter() - opened)


def backend_of(config: SearchConfig) -> str:
    """Backend that fits the index. Raises: ValueError when --backend asks for another one."""
    has_lucene = is_lucene_index(Path(config.index_path))
    if has_lucene and config.backend == "bm25s":
        raise ValueError(f"{config.index_path!r} is a Lucene index; drop --backend bm25s or give another --index_path")
    return config.backend or ("pyserini" if has_lucene else "bm25s")


def _open(backend: str, folder: Path, segments_path: Path) -> SegmentIndex:
    if backend == "pyserini":
        return LuceneIndex(folder, segments_path)
    from fairseq.data.bm25.index import open_index  # torch and bm25s take seconds to import

    return open_index(folder, segments_path)


def _search(
    index: SegmentIndex, segments_path: Path, writer: ShardWriter, first: int, stop: int, num_neighbors: int
) -> None:
    texts = itertools.islice(read_segments(segments_path), first, stop)
    began = logged = time.perf_counter()
    position = first
    while batch := list(itertools.islice(texts, index.queries_at_once)):
        neighbors = index.search(batch, position, num_neighbors)
        writer.add(list(enumerate(neighbors, start=position)))
        position += len(batch)
        now = time.perf_counter()
        if now - logged > _LOG_SECONDS:
            logged, speed = now, (position - first) / (now - began)
            seconds_left = (stop - position) / speed
            logger.info("searched %d of %d, %.1f/s, %.0fs left", position - first, stop - first, speed, seconds_left)

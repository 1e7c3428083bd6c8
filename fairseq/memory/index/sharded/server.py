"""A worker's side: opens a range of rows where it runs and answers with row numbers of the whole store."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray, as_tensor
from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.datastore.metadata import digest_on_disk
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss_library import faiss_library
from fairseq.memory.index.opening import open_faiss
from fairseq.memory.types import Array, Metric

if TYPE_CHECKING:
    from fairseq.memory.index.base import Index
    from fairseq.memory.index.sharded.ranges import KeyFile, RowRange


_WARM_QUERIES = 64  # many enough for the search of many


@dataclass(frozen=True)
class RangeFacts:
    """An opened range."""

    first_row: int
    rows: int
    dim: int
    metric: Metric
    deleted: Array
    """int64 rows of the whole store that are never found."""
    streams_keys: bool

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> RangeFacts:
        """What ``RangeServer.describe`` answered."""
        return cls(**{**answer, "metric": Metric(answer["metric"])})


class RangeServer:
    """Searches one range of rows. Files are opened by the first call, so that a restarted worker opens them again."""

    def __init__(self, rows: RowRange, threads: int) -> None:
        """Args.

        rows: the range.
        threads: threads of its searches; set here, because a process that Ray used before keeps its own number.
        """
        self._range = rows
        torch.set_num_threads(threads)
        if rows.indexfile is not None:
            faiss_library().omp_set_num_threads(threads)

    def describe(self) -> dict[str, Any]:
        """Open the range; its facts as ``RangeFacts.of`` takes them, because a process hands them on without torch.

        Raises: ValueError or OSError when its files are missing here, or are those of others.
        """
        index, rows = self._index, self._range
        return {
            "first_row": rows.first_row,
            "rows": len(index),
            "dim": index.dim,
            "metric": index.metric.value,
            "deleted": index.deleted + rows.first_row,
            "streams_keys": index.streams_keys,
        }

    def search(self, query_ND: Array, k: int) -> tuple[Array, Array]:
        """The k closest rows, int64 (N, k), and their scores; -1 and -inf where fewer were found."""
        found = self._index.search(as_tensor(query_ND), k)
        ids_NK = torch.where(found.ids_NK < 0, -1, found.ids_NK + self._range.first_row)
        return ids_NK.numpy(), found.scores_NK.numpy()

    def score_rows(self, query_ND: Array, ids_NM: Array) -> Array:
        """Scores of the rows that are of this range, float32 (N, M); -inf for all others."""
        rows = self._range
        local_NM = ids_NM - rows.first_row
        local_NM[(local_NM < 0) | (local_NM >= rows.rows)] = -1
        scores: Array = self._index.score_rows(as_tensor(query_ND), torch.from_numpy(local_NM)).numpy()
        return scores

    @functools.cached_property
    def _index(self) -> Index:
        rows, settings = self._range, self._range.settings
        if rows.indexfile is None:
            keys = ChunkedArray([_map_keys(file, rows) for file in rows.files], rows.dtype)
            exact = ExactIndex(keys, settings.metric, memory_bytes=settings.memory_bytes, deleted=rows.deleted)
            if settings.gpu:
                exact.use_gpus()
            return exact
        if not os.path.isfile(rows.indexfile):
            raise ValueError(_unseen(rows.indexfile))
        index = open_faiss(
            rows.indexfile,
            settings.metric,
            rows.name,
            rows.digest,
            rows.deleted,
            probe=settings.probe,
            mapped=settings.mapped,
        )
        if settings.gpu:
            index.use_gpus()
        return index


def before_fork() -> None:
    """Load the compiled kernels of exact search, 0.5 s of a CPU, once for all workers of a node."""
    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    query_ND = torch.randn(_WARM_QUERIES, 8)
    index = ExactIndex(torch.randn(2 * _WARM_QUERIES, 8).half().numpy())
    for count in (1, _WARM_QUERIES):
        index.search(query_ND[:count], 4)


def _map_keys(file: KeyFile, rows: RowRange) -> Array:
    if not os.path.isfile(file.path):
        raise ValueError(_unseen(file.path))
    if file.prefix is not None and digest_on_disk(file.prefix) != file.digest:
        raise ValueError(
            f"{file.path} on {socket.gethostname()} is of another datastore than the one that is searched; copy the "
            "shard again, with its JSON file"
        )
    dtype = KEY_DTYPES.get(rows.dtype) or np.dtype(rows.dtype)
    needed = file.offset + file.rows * rows.dim * dtype.itemsize
    if os.path.getsize(file.path) < needed:
        raise ValueError(
            f"{file.path} on {socket.gethostname()} holds {os.path.getsize(file.path)} bytes, {file.rows} rows "
            f"take {needed}; copy it again"
        )
    return np.memmap(file.path, dtype, "r", file.offset, (file.rows, rows.dim))[file.start : file.stop]


def _unseen(path: str) -> str:
    return (
        f"{path} is not on {socket.gethostname()}, where a worker is to search it; put the datastore on a disk that "
        "every node sees, or copy the shard there under the same name"
    )

"""A store cut into ranges of rows, each described so that a process on another machine can open it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fairseq.memory.datastore.metadata import content_digest
from fairseq.memory.index.faiss.index import find_index
from fairseq.memory.types import Array, Metric

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

_MOST_PER_CPU = 16


@dataclass(frozen=True)
class SearchSettings:
    """How every range is searched."""

    metric: Metric = Metric.L2
    probe: int = 8
    mapped: bool = False
    gpu: bool = True
    memory_bytes: int = 2 << 30
    """Limit on the working memory of exact search, of each worker."""


@dataclass(frozen=True)
class KeyFile:
    """A file of keys, and the rows of it that belong to a range."""

    path: str
    offset: int
    """Bytes before the first row."""
    rows: int
    """Rows of the whole file."""
    start: int
    stop: int
    prefix: str | None
    """Prefix of the shard, whose JSON file states the digest; None for files of another program."""
    digest: str | None


@dataclass(frozen=True)
class RowRange:
    """Rows of a store for one worker: paths, never arrays, because Ray would copy a mapped array whole."""

    first_row: int
    rows: int
    dim: int
    dtype: str
    files: tuple[KeyFile, ...]
    deleted: Array
    """int64, ascending, counted from the first row of the range."""
    settings: SearchSettings
    indexfile: str | None = None
    """The faiss index over exactly these rows; None for exact search."""
    digest: str | None = None
    """What the index must have been built over."""

    @property
    def name(self) -> str:
        """The range in words, for messages."""
        return f"rows {self.first_row} to {self.first_row + self.rows - 1}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that its worker reads."""
        return (self.indexfile,) if self.indexfile else tuple(file.path for file in self.files)


def cut(store: Datastore, indexfile: str | None, settings: SearchSettings, num_workers: int) -> list[RowRange]:
    """Ranges for so many workers, in the order of the rows, which all of them together cover exactly once.

    Without an index the rows are cut evenly, wherever shards end. An index cannot be cut: one over the whole store
    is one range, and where there is one for each shard (NAME.partI-of-N) each shard is a range.
    Raises: ValueError when the index is missing, or the keys are in no file.
    """
    files = _key_files(store)
    if indexfile is None:
        count = min(num_workers, len(store))
        edges = [len(store) * at // count for at in range(count + 1)]
        return [_range(store, files, settings, first, past) for first, past in zip(edges, edges[1:])]
    names = shard_indexes(store, indexfile, settings.metric)
    if names is None:
        path = os.path.abspath(find_index(indexfile, settings.metric))
        return [_range(store, files, settings, 0, len(store), path, store.digest)]
    ranges = []
    for shard, path in zip(store.shards, names):
        digest = content_digest(shard.metadata)
        past = shard.first_row + shard.rows
        ranges.append(_range(store, files, settings, shard.first_row, past, path, digest))
    return ranges


def shard_indexes(store: Datastore, indexfile: str, metric: Metric) -> list[str] | None:
    """The index of each shard, NAME.partI-of-N; None if there is no such file, or there is one over the whole store.

    Raises: ValueError when some shards have an index and others have none.
    """
    count = len(store.shards)
    names = [f"{indexfile}.part{shard}-of-{count}" for shard in range(count)]
    held = [
        any(Path(f"{name}{end}").is_file() for end in ("", *(f".{each.value}" for each in Metric))) for name in names
    ]
    if count < 2 or not any(held) or Path(indexfile).is_file() or Path(f"{indexfile}.{metric.value}").is_file():
        return None
    return [os.path.abspath(find_index(name, metric)) for name in names]


def default_workers(store: Datastore, indexfile: str | None, settings: SearchSettings, num_nodes: int) -> int:
    """One worker for each shard, or for each node if there are more; an index decides by itself."""
    if indexfile is not None:
        return len(shard_indexes(store, indexfile, settings.metric) or (None,))
    return max(1, len(store.shards), num_nodes)


def service_name(store: Datastore, ranges: Sequence[RowRange]) -> str:
    """Identity of what is searched, however it is cut: the store's place, its content, and index files and settings.

    Of each a part, with dots between them; deleted rows count as content.
    Raises: ValueError for a store without a digest.
    """
    if store.digest is None:
        raise ValueError(
            f"datastore {store.prefix!r} has no checksums to know it by; fairseq-datastore convert writes a store "
            "of ours"
        )
    settings = ranges[0].settings
    words: list[object] = [settings.metric.value]
    for each in ranges:
        if each.indexfile is not None:
            stat = os.stat(each.indexfile)
            words += [each.first_row, each.digest, stat.st_size, stat.st_mtime_ns, settings.probe]
    parts = (os.path.abspath(store.prefix), (store.digest, store.deleted.tobytes()), words)
    return ".".join(hashlib.sha256(repr(part).encode()).hexdigest()[:24] for part in parts)


def check_not_replaced(store: Datastore, name: str, served: Sequence[str]) -> None:
    """Raise ValueError where what is served of a store's place is not what its files hold now.

    Args:
        name: of the service that would search it.
        served: names of all services.
    """
    place, content, _ = name.split(".")
    others = [each for each in served if each.startswith(f"{place}.")]
    if others and not any(each.startswith(f"{place}.{content}.") for each in others):
        raise ValueError(
            f"what is served of datastore {store.prefix!r} is older than its files: the store was replaced, or rows "
            "were deleted, since; restart fairseq-datastore serve, or give --search-on ray to search it here"
        )


def check_count(num_workers: int | None, rows: int, prefix: str) -> None:
    """Raise ValueError for more workers than a store has rows."""
    if num_workers is not None and num_workers > rows:
        raise ValueError(
            f"--search-workers {num_workers} are more than the {rows} rows of datastore {prefix!r}; give fewer, or "
            "drop the flag"
        )


def check_cpus(num_workers: int | None, cpus: float) -> None:
    """Raise ValueError for more workers, each of them a process, than CPUs can run."""
    most = max(1, int(_MOST_PER_CPU * cpus))
    if num_workers is not None and num_workers > most:
        raise ValueError(
            f"--search-workers {num_workers} are too many for the {cpus:g} CPUs of the Ray cluster, which can run "
            f"{most} ({_MOST_PER_CPU} each); give fewer, or drop the flag"
        )


def _key_files(store: Datastore) -> list[KeyFile]:
    """All files of keys, whole."""
    files = []
    for shard in store.shards:
        path, digest = os.path.abspath(shard.names.keys), content_digest(shard.metadata)
        files.append(KeyFile(path, 0, shard.rows, 0, shard.rows, os.path.abspath(shard.prefix), digest))
    if files:
        return files
    for chunk in store.keys.chunks:
        if not isinstance(chunk, np.memmap):
            raise ValueError(
                f"--search-on needs the keys of datastore {store.prefix!r} in files; drop --move-dstore-to-mem and "
                "--no-load-keys, or write a store of ours with fairseq-datastore convert"
            )
        files.append(
            KeyFile(os.path.abspath(str(chunk.filename)), int(chunk.offset), len(chunk), 0, len(chunk), None, None)
        )
    return files


def _range(
    store: Datastore,
    files: Sequence[KeyFile],
    settings: SearchSettings,
    first: int,
    past: int,
    indexfile: str | None = None,
    digest: str | None = None,
) -> RowRange:
    pieces, begin = [], 0
    for file in files:
        start, stop = max(first - begin, 0), min(past - begin, file.rows)
        if start < stop:
            pieces.append(KeyFile(file.path, file.offset, file.rows, start, stop, file.prefix, file.digest))
        begin += file.rows
    low, high = np.searchsorted(store.deleted, (first, past))
    deleted = store.deleted[low:high] - first
    dtype = store.keys.dtype
    return RowRange(first, past - first, store.dim, dtype, tuple(pieces), deleted, settings, indexfile, digest)

"""Copies of a datastore: in another type, from another program's files, a sample, or without deleted rows.

The same command resumes an interrupted copy; an older store stays until the copy is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray, nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.datastore.metadata import all_deleted, is_there, part_prefix
from fairseq.memory.datastore.writer import DatastoreWriter, NonFiniteError, finish_interrupted
from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20
_SECONDS_BETWEEN_CHECKPOINTS = 5.0
_OF_THE_FILES = frozenset(
    "format_version complete rows dim key_dtype value_dtype keys_file values_file documents_file block_bytes checksums "
    "deleted parts shard_id num_shards first_row total_rows copied_from".split()
)


@dataclass(frozen=True)
class Copied:
    """Summary of a copy."""

    rows: int
    """Rows of the copy."""
    left_out: int
    """Rows of the source that are not in it."""
    nonfinite: int = 0
    """Number of those that held NaN or infinity."""


class Selection:
    """Some rows of a store: those that are listed, or all others."""

    def __init__(self, listed: Array, *, kept: bool) -> None:
        """Take int64 rows, rising."""
        self._listed, self._kept = listed, kept

    def count(self, total: int) -> int:
        """Number of the ``total`` rows that are chosen."""
        return len(self._listed) if self._kept else total - len(self._listed)

    def within(self, start: int, stop: int) -> Array:
        """Those from ``start`` to ``stop`` (not included), rising."""
        low, high = np.searchsorted(self._listed, [start, stop])
        if self._kept:
            return self._listed[low:high]
        keep = np.ones(stop - start, dtype=bool)
        keep[self._listed[low:high] - start] = False
        return start + np.flatnonzero(keep)


def convert(source: Datastore, prefix: str | Path, dtype: str, metadata: Mapping[str, Any], *, drop: bool) -> Copied:
    """Write a store with keys of another type (or the same), without its deleted rows.

    Args:
        metadata: what is to be said of it beside what the source says.
        drop: leave out rows whose key is not finite in the new type.
    Raises: ValueError with their number when there are such rows and they are not to be dropped.
    """
    bad = np.setdiff1d(nonfinite_rows(source.keys, dtype), source.deleted) if drop else np.empty(0, np.int64)
    chosen = Selection(np.union1d(bad, source.deleted), kept=False)
    try:
        rows = _copy(source, prefix, dtype, chosen, dict(metadata) | {"nonfinite_dropped": len(bad)})
    except NonFiniteError as error:
        count = len(np.setdiff1d(nonfinite_rows(source.keys, dtype), source.deleted))
        raise ValueError(
            f"{count} of the {source.num_alive} keys of datastore {source.prefix!r} hold NaN or infinity as {dtype}; "
            "--drop-nonfinite leaves these rows out"
        ) from error
    return Copied(rows, len(source) - rows, len(bad))


def sample(source: Datastore, prefix: str | Path, count: int, seed: int) -> Copied:
    """Write a store of random rows, in their order; those that are deleted are never drawn.

    Raises: ValueError when there are not so many.
    """
    if count > source.num_alive:
        raise ValueError(f"--rows {count}: datastore {source.prefix!r} has {source.num_alive} rows to draw from")
    drawn = np.sort(np.random.default_rng(seed).choice(source.num_alive, count, replace=False))
    # Before the n-th row that is left stand as many deleted ones as have no more than n others before them.
    drawn += np.searchsorted(source.deleted - np.arange(len(source.deleted)), drawn, side="right")
    about = {"sampled": {"rows": count, "seed": seed}}
    return Copied(_copy(source, prefix, source.keys.dtype, Selection(drawn, kept=True), about), len(source) - count)


def compact(prefix: str | Path) -> Copied:
    """Rewrite a store without its deleted rows. Row numbers change, so its indexes are out of date afterwards.

    The arrays of its shards are removed when the new ones are whole; those of other stores it was merged of are not.
    """
    finish_interrupted(prefix)
    source = Datastore.open(prefix)
    if len(source.deleted):
        chosen = Selection(source.deleted, kept=False)
        _copy(source, prefix, source.keys.dtype, chosen, {"compacted": len(source.deleted)}, in_place=True)
        _remove_shards(source)
    return Copied(source.num_alive, len(source.deleted))


def nonfinite_rows(keys: ChunkedArray, dtype: str) -> Array:
    """Rows whose key holds NaN or infinity as this type, int64, rising."""
    found = [
        start + nonfinite(keys.block(start, stop).to(getattr(torch, dtype)))
        for start, stop in _blocks(len(keys), keys.shape[1])
    ]
    rows: Array = torch.cat(found).numpy()
    return rows


def _blocks(num_rows: int, dim: int, start: int = 0) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_BYTES // (4 * dim))
    for first in range(start, num_rows, step):
        yield first, min(first + step, num_rows)


def _copy(
    source: Datastore,
    prefix: str | Path,
    dtype: str,
    chosen: Selection,
    metadata: Mapping[str, Any],
    in_place: bool = False,
) -> int:
    """Write the chosen rows to a store of their own; returns how many they are."""
    count = chosen.count(len(source))
    if not count:
        raise ValueError(f"no row of datastore {source.prefix!r} is left; nothing is written")
    about = {name: value for name, value in source.metadata.items() if name not in _OF_THE_FILES}
    documents = _documents(source, chosen)
    if documents is not None and not source.has_documents:
        about |= {"document_unit": "row", "num_documents": 1}
    about |= dict(metadata) | {"copied_from": _fingerprint(source)}
    metadata_file = StoreFiles.of(prefix, dtype).metadata
    if not in_place and metadata_file.exists():
        if not is_there(prefix, about | {"rows": count, "key_dtype": dtype}):
            raise ValueError(f"{metadata_file} is that of another datastore; choose another name, or remove it first")
        logger.info("%s is complete already; remove it to make it again", prefix)
        return count
    with DatastoreWriter(prefix, count, source.dim, dtype, about, documents=documents) as writer:
        if source.parts and len(all_deleted(source.prefix, source.metadata, source.parts)) != len(source.deleted):
            raise ValueError(f"rows of datastore {source.prefix!r} were deleted just now; give the command again")
        start, saved = int((writer.cursor or {}).get("row", 0)), time.perf_counter()
        if start:
            logger.info("resuming at row %d of %d", start, len(source))
        for first, stop in _blocks(len(source), source.dim, start):
            writer.append(*_rows(source, chosen.within(first, stop), first, stop))
            if time.perf_counter() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                writer.checkpoint({"row": stop})
                saved = time.perf_counter()
        writer.finish()
    return count


def _rows(source: Datastore, ids: Array, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows of a block."""
    if len(ids) == stop - first:
        return source.keys.block(first, stop), source.values.block(first, stop)
    return source.keys.take(ids), source.values.take(ids)


def _documents(source: Datastore, chosen: Selection) -> Array | None:
    """Positions of the chosen rows in their text; None where those are their positions in the store."""
    if chosen.count(len(source)) == len(source):
        return source.documents.runs_R3 if source.has_documents else None
    runs, rows = [], 0
    for first, stop in _blocks(len(source), source.dim):
        ids = chosen.within(first, stop)
        runs.append(Documents.of_places(*source.where(ids), first_row=rows).runs_R3)
        rows += len(ids)
    return np.concatenate(runs)


def _fingerprint(source: Datastore) -> str:
    """Identity of the rows that are copied: the content where it is known, else the files."""
    files = [*source.keys.files, *source.values.files]
    content = source.digest or [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(content).encode() + source.deleted.tobytes()).hexdigest()


def _remove_shards(source: Datastore) -> None:
    """Remove the files of the parts that were this store's alone."""
    count = len(source.parts)
    shards = {os.path.abspath(part_prefix(source.prefix, shard, count)) for shard in range(count)}
    for part in source.parts:
        names = part.names
        if os.path.abspath(part.prefix) in shards:
            for path in (names.metadata, names.keys, names.values, names.documents, names.deleted):
                path.unlink(missing_ok=True)
        elif part.prefix != source.prefix:
            logger.warning("%s is not part of the store any more; remove it if you do not need it", part.prefix)

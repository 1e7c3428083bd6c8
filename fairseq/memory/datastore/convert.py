"""Copies of a datastore: in another type, from another program's files, or a sample.

The same command resumes an interrupted copy; an older store stays until the copy is complete.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.memory.datastore.chunked_array import ChunkedArray, nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.datastore.metadata import all_deleted, store_exists
from fairseq.memory.datastore.reading.read_ahead import ReadAhead, iter_blocks
from fairseq.memory.datastore.writer import DatastoreWriter, NonFiniteError
from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20
_FILE_FIELDS = frozenset(
    "format_version complete rows dim key_dtype value_dtype keys_file values_file documents_file block_bytes checksums "
    "deleted parts shard_id num_shards first_row total_rows copied_from generation compaction deleted_checksum".split()
)


@dataclass(frozen=True)
class CopyReport:
    """Row counts of a copy."""

    rows: int
    """Rows of the copy."""
    dropped: int
    """Rows of the source that are not in it."""
    nonfinite: int = 0
    """Number of dropped rows that held NaN or infinity."""


class Selection:
    """A selection of rows: the listed ones, or all others."""

    def __init__(self, listed: Array, *, kept: bool) -> None:
        """Select int64 rows, ascending."""
        self._listed, self._kept = listed, kept

    def count(self, total: int) -> int:
        """Number of selected rows among ``total``."""
        return len(self._listed) if self._kept else total - len(self._listed)

    def within(self, start: int, stop: int) -> Array:
        """Selected rows from ``start`` to ``stop`` (not included), ascending."""
        low, high = np.searchsorted(self._listed, [start, stop])
        if self._kept:
            return self._listed[low:high]
        keep = np.ones(stop - start, dtype=bool)
        keep[self._listed[low:high] - start] = False
        return start + np.flatnonzero(keep)


def convert(
    source: Datastore, prefix: str | Path, dtype: str, metadata: Mapping[str, Any], *, drop: bool
) -> CopyReport:
    """Write a store with keys of another type (or the same), without its deleted rows.

    Args:
        metadata: fields to add to the metadata of the source.
        drop: True drops rows whose key is not finite in the new type.
    Raises: ValueError with their number if there are such rows and ``drop`` is False.
    """
    bad = np.setdiff1d(nonfinite_rows(source.keys, dtype), source.deleted) if drop else np.empty(0, np.int64)
    chosen = Selection(np.union1d(bad, source.deleted), kept=False)
    try:
        rows = copy_rows(source, prefix, dtype, chosen, dict(metadata) | {"nonfinite_dropped": len(bad)})
    except NonFiniteError as error:
        count = len(np.setdiff1d(nonfinite_rows(source.keys, dtype), source.deleted))
        raise ValueError(
            f"{count} of the {source.num_alive} keys of datastore {source.prefix!r} hold NaN or infinity as {dtype}; "
            "drop them with --drop-nonfinite"
        ) from error
    return CopyReport(rows, len(source) - rows, len(bad))


def sample(source: Datastore, prefix: str | Path, count: int, seed: int) -> CopyReport:
    """Write a store of random rows, in their order; deleted rows are never drawn.

    Raises: ValueError when the store has fewer rows.
    """
    if count > source.num_alive:
        raise ValueError(
            f"--rows {count}: datastore {source.prefix!r} has {source.num_alive} rows to draw from; give at most "
            f"{source.num_alive}"
        )
    drawn = np.sort(np.random.default_rng(seed).choice(source.num_alive, count, replace=False))
    # The n-th remaining row is preceded by all deleted rows that have at most n remaining ones before them.
    drawn += np.searchsorted(source.deleted - np.arange(len(source.deleted)), drawn, side="right")
    record = {"sampled": {"rows": count, "seed": seed}}
    return CopyReport(
        copy_rows(source, prefix, source.keys.dtype, Selection(drawn, kept=True), record), len(source) - count
    )


def nonfinite_rows(keys: ChunkedArray, dtype: str) -> Array:
    """Rows whose key holds NaN or infinity as this type, int64, ascending."""
    bad = [
        start + nonfinite(block_ND.to(getattr(torch, dtype)))
        for start, block_ND in iter_blocks(keys, _block_rows(keys.shape[1]))
    ]
    rows: Array = torch.cat(bad).numpy()
    return rows


def _block_rows(dim: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * dim))


def _blocks(num_rows: int, dim: int, start: int = 0) -> list[slice]:
    step = _block_rows(dim)
    return [slice(first, min(first + step, num_rows)) for first in range(start, num_rows, step)]


def copy_rows(
    source: Datastore,
    prefix: str | Path,
    dtype: str,
    chosen: Selection,
    metadata: Mapping[str, Any],
    in_place: bool = False,
) -> int:
    """Write the chosen rows to a new store; returns their number.

    Args:
        metadata: fields to add to the metadata of the source.
        in_place: the new store replaces the source once it is complete.
    Raises: ValueError when no row is chosen, or ``prefix`` is the name of another store.
    """
    count = chosen.count(len(source))
    if not count:
        raise ValueError(f"no row of datastore {source.prefix!r} would remain; keep at least one")
    record = {name: value for name, value in source.metadata.items() if name not in _FILE_FIELDS}
    documents = _documents(source, chosen)
    if documents is not None and not source.has_documents:
        record |= {"document_unit": "row", "num_documents": 1}
    record |= dict(metadata) | {"copied_from": _fingerprint(source)}
    metadata_file = StoreFiles.of(prefix, dtype).metadata

    def is_written() -> bool:
        if in_place or not metadata_file.exists():
            return False
        if not store_exists(prefix, record | {"rows": count, "key_dtype": dtype}):
            raise ValueError(f"{metadata_file} is that of another datastore; choose another name, or remove its files")
        logger.info("%s is complete already; remove it to make it again", prefix)
        return True

    if is_written():
        return count
    with DatastoreWriter(prefix, count, source.dim, dtype, record, documents=documents) as writer:
        if not in_place and metadata_file.exists():  # since, by another process: only now it is kept out
            writer.discard()
            is_written()
            return count
        if source.shards and len(all_deleted(source.prefix, source.metadata, source.shards)) != len(source.deleted):
            raise ValueError(f"rows of datastore {source.prefix!r} were deleted during the copy; run the command again")
        start = int((writer.cursor or {}).get("row", 0))
        if start:
            logger.info("resuming at row %d of %d", start, len(source))
        blocks = _blocks(len(source), source.dim, start)
        with ReadAhead(source.keys, blocks) as keys:
            for number, rows in enumerate(blocks):
                ids = chosen.within(rows.start, rows.stop)
                if len(ids) == rows.stop - rows.start:
                    writer.append(keys.block(number), source.values.block(rows.start, rows.stop))
                else:
                    writer.append(source.keys.take(ids), source.values.take(ids))
                writer.checkpoint_when_due({"row": rows.stop})
        writer.finish()
    return count


def _documents(source: Datastore, chosen: Selection) -> Array | None:
    """Positions of the chosen rows in their text; None where those are their positions in the store."""
    if chosen.count(len(source)) == len(source):
        return source.documents.runs_R3 if source.has_documents else None
    runs, rows = [], 0
    for block in _blocks(len(source), source.dim):
        ids = chosen.within(block.start, block.stop)
        runs.append(Documents.of_positions(*source.where(ids), first_row=rows).runs_R3)
        rows += len(ids)
    return np.concatenate(runs)


def _fingerprint(source: Datastore) -> str:
    """Identity of the rows that are copied: the content where it is known, else the files."""
    files = [*source.keys.files, *source.values.files]
    content = source.digest or [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(content).encode() + source.deleted.tobytes()).hexdigest()

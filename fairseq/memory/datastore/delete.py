"""Deletion of rows: they are listed in a file that every search honours, until the store is rewritten without them.

Rewriting (``compact``) numbers the rows anew, so every rewrite starts a new generation of row numbers. The JSON file
records the request that led to it: the same request again finds its work done and takes no other rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq.memory.datastore.convert import CopyReport, Selection, copy_rows
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.layout import StoreFiles, StoreName
from fairseq.memory.datastore.metadata import (
    Shard,
    content_digest,
    deleted_checksum,
    digest_on_disk,
    read_deleted,
    shard_prefix,
)
from fairseq.memory.datastore.writer import finish_interrupted
from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import replacing
from fairseq.runtime.files import locked, may_create_in, write_json
from fairseq.runtime.records import seal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeletionReport:
    """Row counts of a deletion."""

    new: int
    """Newly deleted rows."""
    total: int
    """All deleted rows."""
    rows: int
    """Rows of the store, deleted ones included."""


def delete(
    prefix: str | Path, rows: Array | None = None, documents: Sequence[int] = (), generation: int | None = None
) -> DeletionReport:
    """Delete rows, given by number or by document.

    Args:
        generation: that of the row numbers; None for the present one.
    Raises: ValueError for an unknown row or document, for numbers of another generation, and when no row would remain;
        OSError when the store cannot be written or another process is writing it.
    """
    finish_interrupted(prefix)
    names = StoreFiles.of(prefix)
    may_create_in(names.metadata.parent)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        store = Datastore.open(prefix, with_keys=False)
        _check_generation(store, generation)
        chosen = np.union1d(_rows(store, rows), _rows_of(store, documents))
        deleted = np.union1d(store.deleted, chosen)
        if len(deleted) == len(store):
            raise ValueError(
                f"all {len(store)} rows of datastore {str(prefix)!r} would be deleted; remove its files instead"
            )
        own = np.union1d(read_deleted(prefix, store.metadata), chosen)
        # The file first: it may hold more rows than the metadata count, never fewer.
        write_deleted(prefix, own)
        count = {"deleted": len(own), "deleted_checksum": deleted_checksum(prefix)} if len(own) else {}
        write_json(names.metadata, seal(dict(store.metadata) | count))
    return DeletionReport(len(deleted) - len(store.deleted), len(deleted), len(store))


def compact(prefix: str | Path, request: str = "") -> CopyReport:
    """Rewrite a store without its deleted rows. Row numbers change, so its indexes become stale.

    The arrays of its shards are removed once the new ones are complete; those of other merged stores are kept.

    Args:
        request: digest of the request that led to it (``request_digest``), kept in the metadata.
    """
    finish_interrupted(prefix)
    source = Datastore.open(prefix)
    if len(source.deleted):
        own = _own_shards(source)
        record = {"request": request, "rows_before": len(source)}
        record |= {"replaced": [os.path.basename(shard.prefix) for shard in own]}
        record |= {"replaced_digests": [content_digest(shard.metadata) for shard in own]}
        metadata = {"compacted": len(source.deleted), "generation": generation_of(source) + 1, "compaction": record}
        chosen = Selection(source.deleted, kept=False)
        copy_rows(source, prefix, source.keys.dtype, chosen, metadata, in_place=True)
        for shard in source.shards:
            if shard.prefix != source.prefix and shard not in own:
                logger.warning("%s no longer belongs to the store; remove it if you do not need it", shard.prefix)
    _remove_replaced(prefix)
    return CopyReport(source.num_alive, len(source.deleted))


def request_digest(rows: Array | None, documents: Sequence[int]) -> str:
    """Identity of a request to delete: the same whatever the order in which rows and documents are named."""
    chosen = np.unique(np.asarray([] if rows is None else rows, dtype=np.int64))
    return hashlib.sha256(chosen.tobytes() + repr(sorted(set(documents))).encode()).hexdigest()


def generation_of(store: Datastore) -> int:
    """Number of times the store was rewritten without its deleted rows."""
    return int(store.metadata.get("generation", 0))


def compacted_by(prefix: str | Path, request: str, generation: int | None) -> Datastore | None:
    """The store, if this request led to its last rewriting and nothing was deleted since; None otherwise.

    Args:
        generation: that of the request's row numbers; the present one makes it a new request.
    """
    finish_interrupted(prefix)
    may_create_in(StoreName.of(prefix).folder)
    with locked(StoreFiles.of(prefix).lock, f"datastore {str(prefix)!r}"):
        store = Datastore.open(prefix, with_keys=False)
        present = generation_of(store)
        is_same = present > 0 and store.metadata["compaction"]["request"] == request and not len(store.deleted)
        if is_same and generation in (None, present - 1):
            _remove_replaced(prefix)
            return store
    return None


def write_deleted(prefix: str | Path, rows: Array) -> None:
    """Replace the list of deleted rows."""
    with replacing(StoreFiles.of(prefix).deleted) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())


def _rows(store: Datastore, rows: Array | None) -> Array:
    rows = np.unique(np.asarray([] if rows is None else rows, dtype=np.int64))
    if len(rows) and (rows[0] < 0 or rows[-1] >= len(store)):
        unknown = rows[0] if rows[0] < 0 else rows[-1]
        raise ValueError(
            f"row {unknown} is not in datastore {store.prefix!r}, whose rows are 0 to {len(store) - 1}; none is "
            "deleted: correct --rows"
        )
    return rows


def _rows_of(store: Datastore, documents: Sequence[int]) -> Array:
    if not documents:
        return np.empty(0, np.int64)
    if not store.has_documents:
        raise ValueError(
            f"datastore {store.prefix!r} does not record the documents of its rows; give --rows, or save it again"
        )
    existing = np.unique(store.documents.runs_R3[:, 1])
    missing = np.setdiff1d(documents, existing)
    if len(missing):
        raise ValueError(
            f"document {missing[0]} has no row in datastore {store.prefix!r}, whose documents are {existing[0]} to "
            f"{existing[-1]}; none is deleted: correct --documents"
        )
    return store.documents.rows_of(documents, len(store))


def _check_generation(store: Datastore, generation: int | None) -> None:
    present = generation_of(store)
    if generation is not None and generation != present:
        raise ValueError(
            f"--generation {generation}: the rows of datastore {store.prefix!r} are numbered anew since, it is of "
            f"generation {present} ({present} times rewritten); look the rows up again and give --generation {present}"
        )


def _own_shards(source: Datastore) -> list[Shard]:
    """The shards that belong to this store alone."""
    count = len(source.shards)
    prefixes = {os.path.abspath(shard_prefix(source.prefix, shard_id, count)) for shard_id in range(count)}
    return [shard for shard in source.shards if os.path.abspath(shard.prefix) in prefixes]


def _remove_replaced(prefix: str | Path) -> None:
    """Remove the files of shards that a rewritten store replaced, those that a killed command left too.

    They lie in the folder of the store. One that was saved again since, or of which a release before recorded no
    digest, is kept.
    """
    store = Datastore.open(prefix, with_keys=False)
    record = store.metadata.get("compaction", {})
    digests = record.get("replaced_digests", ())
    for number, name in enumerate(record.get("replaced", ())):
        shard = str(StoreName.of(prefix).folder / os.path.basename(name))
        names = StoreFiles.of(shard, store.keys.dtype)
        if not names.metadata.exists():
            continue
        if number >= len(digests) or digests[number] is None or digest_on_disk(shard) != digests[number]:
            logger.warning("%s is not known to be the shard that was replaced; remove it if you do not need it", shard)
            continue
        # The JSON file last: a command that is killed here finds the rest by it.
        for path in (names.keys, names.values, names.documents, names.deleted, names.metadata):
            path.unlink(missing_ok=True)

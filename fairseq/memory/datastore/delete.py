"""Deletion of rows: they are listed in a file that every search honours; the arrays stay unchanged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.layout import StoreFiles
from fairseq.memory.datastore.metadata import read_deleted
from fairseq.memory.types import Array
from fairseq.runtime.atomic_files import replacing
from fairseq.runtime.files import locked, may_create_in, write_json


@dataclass(frozen=True)
class DeletionReport:
    """Row counts of a deletion."""

    new: int
    """Newly deleted rows."""
    total: int
    """All deleted rows."""
    rows: int
    """Rows of the store, deleted ones included."""


def delete(prefix: str | Path, rows: Array | None = None, documents: Sequence[int] = ()) -> DeletionReport:
    """Delete rows, given by number or by document.

    Raises: ValueError for an unknown row or document, and when no row would remain; OSError when the store cannot be
    written or another process is writing it.
    """
    names = StoreFiles.of(prefix, "float32")
    may_create_in(names.metadata.parent)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        store = Datastore.open(prefix, with_keys=False)
        chosen = np.union1d(_rows(store, rows), _rows_of(store, documents))
        deleted = np.union1d(store.deleted, chosen)
        if len(deleted) == len(store):
            raise ValueError(
                f"all {len(store)} rows of datastore {str(prefix)!r} would be deleted; remove its files instead"
            )
        own = np.union1d(read_deleted(prefix, store.metadata), chosen)
        # The file first: it may hold more rows than the metadata count, never fewer.
        write_deleted(prefix, own)
        write_json(names.metadata, dict(store.metadata) | {"deleted": len(own)})
    return DeletionReport(len(deleted) - len(store.deleted), len(deleted), len(store))


def write_deleted(prefix: str | Path, rows: Array) -> None:
    """Replace the list of deleted rows."""
    with replacing(StoreFiles.of(prefix, "float32").deleted) as temporary, open(temporary, "wb") as file:
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

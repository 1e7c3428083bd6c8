"""Combines datastores without copying their arrays, by a JSON file that lists them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.chunked_array import view_as
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import write_deleted
from fairseq.memory.datastore.layout import FORMAT_VERSION, KEY_DTYPES, StoreFiles, StoreName, require_free
from fairseq.memory.datastore.metadata import (
    Shard,
    content_digest,
    deleted_checksum,
    documents_of,
    read_deleted,
    read_metadata,
    require_alike,
    saved_shards,
    shard_prefix,
)
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.types import Array
from fairseq.runtime.files import locked, may_create_in, read_json, write_json
from fairseq.runtime.records import seal

logger = logging.getLogger(__name__)

# Fields that may differ between the shards of one store, and fields that describe files, not rows.
_SHARD_FIELDS = frozenset(
    "format_version complete rows keys_file values_file documents_file block_bytes checksums deleted parts shard_id "
    "num_shards first_row total_rows num_documents with_scores deleted_checksum".split()
)
_MUST_AGREE = ("dim", "key_dtype", "value_dtype", "key_tap", "dictionary_digest", "dictionary_size", "model_digest")


def join_shards(prefix: str | Path, num_shards: int, seconds: float = 0.0) -> dict[str, Any] | None:
    """Combine the shards of a store, unless one is missing; returns the metadata of the store, or None.

    Args:
        seconds: time to wait for the process of another shard that is joining them.
    Raises: ValueError when the shards do not belong together; OSError when another process holds the store.
    """
    prefixes = [shard_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
    with locked(StoreFiles.of(prefix).lock, f"datastore {str(prefix)!r}", seconds):
        if not all(StoreFiles.of(name).metadata.exists() for name in prefixes):
            return None
        shards: list[Shard] = []
        for name in prefixes:
            shard = Shard(name, read_metadata(name), sum(shard.rows for shard in shards))
            if shard.metadata.get("first_row") != shard.first_row:
                raise ValueError(
                    f"{name!r} begins at row {shard.metadata.get('first_row')} of the store, and the shards before it "
                    f"hold {shard.first_row}: they are of another text or model; save them again"
                )
            if shards:
                require_alike(
                    shards[0], shard, sorted((shards[0].metadata.keys() | shard.metadata.keys()) - _SHARD_FIELDS)
                )
            shards.append(shard)
        return _write_combined(prefix, shards, int(shards[0].metadata.get("num_documents", 1)))


def merge(prefix: str | Path, stores: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Concatenate several stores, or join the shards of ``prefix`` where none is named.

    Document numbers continue from store to store; deleted rows stay deleted. Returns: the metadata of the result.
    Raises: ValueError when a store is missing, incomplete or does not fit the others.
    """
    if not stores:
        saved = saved_shards(prefix)
        complete = [count for count, shards in saved.items() if shards == set(range(count))]
        if len(complete) != 1:
            raise ValueError(_why_not_one(str(prefix), saved, complete))
        metadata = join_shards(prefix, complete[0])
        assert metadata is not None
        return metadata
    names = StoreFiles.of(prefix)
    may_create_in(names.metadata.parent)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        _require_free(prefix, stores)
        shards: list[Shard] = []
        deleted = [np.empty(0, np.int64)]
        rows = documents = 0
        for store in stores:
            opened = Datastore.open(store, with_keys=False)
            deleted.append(opened.deleted + rows)
            for shard in opened.shards:
                shards.append(_moved(shard, rows, documents))
                require_alike(shards[0], shard, _MUST_AGREE)
            rows, documents = rows + len(opened), documents + count_documents(opened)
        return _write_combined(prefix, shards, documents, np.concatenate(deleted))


def append(prefix: str | Path, store: str | Path) -> dict[str, Any]:
    """Append a store to a merged one, whose rows and documents keep their numbers; deleted rows stay deleted.

    A reader sees the merged store as it was or with all of the other one, also after a kill.

    Returns: the new metadata. Raises: ValueError when the first is no merged store, or the other does not fit it;
    OSError when another process is writing it.
    """
    names = StoreFiles.of(prefix)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        whole, more = Datastore.open(prefix, with_keys=False), Datastore.open(store, with_keys=False)
        if "parts" not in whole.metadata:
            raise ValueError(f"datastore {str(prefix)!r} has arrays of its own; merge it under another name first")
        rows, documents = len(whole), count_documents(whole)
        entries = []
        for shard in more.shards:
            require_alike(whole.shards[0], shard, _MUST_AGREE)
            entries.append(_entry(prefix, _moved(shard, rows, documents)))
        metadata = dict(whole.metadata) | {"rows": rows + len(more)}
        metadata |= {"parts": [*whole.metadata["parts"], *entries], "num_documents": documents + count_documents(more)}
        write_json(names.metadata, seal(metadata))
    return metadata


def _moved(shard: Shard, rows: int, documents: int) -> Shard:
    """The shard behind so many rows and documents of others."""
    return dataclasses.replace(shard, first_row=shard.first_row + rows, first_document=shard.first_document + documents)


def join_parts(prefix: str | Path, first: int, into: str | Path) -> list[str]:
    """Rewrite the parts of a merged store from number ``first`` on as one; rows and documents keep their numbers.

    A reader sees the store with the old parts or with the new one, also after a kill; the old files stay.

    Args:
        into: prefix of the new part.
    Returns: the prefixes of the old parts, which nothing needs any more. Raises: ValueError when rows of these are
    deleted by themselves; OSError when another process is writing the store.
    """
    names = StoreFiles.of(prefix)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        whole = Datastore.open(prefix, with_keys=False)
        shards, dtype = whole.shards[first:], str(whole.metadata["key_dtype"])
        start = Shard(str(into), {}, shards[0].first_row, shards[0].first_document)
        if any(shard.metadata.get("deleted") for shard in shards):
            raise ValueError(f"parts of datastore {str(prefix)!r} have deleted rows of their own; compact them first")
        kept = {name: value for name, value in shards[0].metadata.items() if name not in _SHARD_FIELDS}
        facts = {name: value for name, value in kept.items() if name not in ("dim", "key_dtype", "value_dtype")}
        table = documents_of(shards).runs_R3 - [start.first_row, start.first_document, 0]
        with DatastoreWriter(into, None, whole.dim, dtype, facts, resume=False) as writer:
            for shard in shards:
                writer.append(view_as(shard.keys(), dtype), shard.values())
            writer.finish(documents=table)
        joined = dataclasses.replace(start, metadata=read_metadata(into))
        parts = [*whole.metadata["parts"][:first], _entry(prefix, joined)]
        write_json(names.metadata, seal(dict(whole.metadata) | {"parts": parts}))
    return [shard.prefix for shard in shards]


def count_documents(store: Datastore) -> int:
    """Documents of a store: those its metadata count, or that its table names where they count none."""
    counted = store.metadata.get("num_documents")
    if counted is not None:
        return int(counted)
    return int(store.documents.runs_R3[:, 1].max()) + 1


def _require_free(prefix: str | Path, stores: Sequence[str | Path]) -> None:
    """Raise ValueError if the combined store has the name of a store with arrays, or of one of its shards."""
    names = StoreFiles.of(prefix)
    taken = {os.path.abspath(StoreFiles.of(store).metadata) for store in stores}
    if os.path.abspath(names.metadata) in taken or (
        names.metadata.exists() and "parts" not in read_json(names.metadata)
    ):
        raise ValueError(f"{names.metadata} is that of a store with arrays of its own; choose another name")


def _write_combined(
    prefix: str | Path, shards: Sequence[Shard], documents: int, deleted: Array | None = None
) -> dict[str, Any]:
    """Write the JSON file of a store of shards, and its deleted rows."""
    for dtype in KEY_DTYPES:
        require_free(prefix, dtype, ("keys", "values"))
    first = shards[0].metadata
    shared = {
        name
        for name in first.keys() - _SHARD_FIELDS
        if all(shard.metadata.get(name) == first[name] for shard in shards)
    }
    metadata: dict[str, Any] = {name: value for name, value in first.items() if name in shared}
    metadata |= {"format_version": FORMAT_VERSION, "complete": True, "rows": sum(shard.rows for shard in shards)}
    metadata |= {"num_documents": documents, "parts": [_entry(prefix, shard) for shard in shards]}
    names = StoreFiles.of(prefix)
    old = read_json(names.metadata) if names.metadata.exists() else None
    if old is not None and content_digest(old) != content_digest(metadata):
        names.deleted.unlink(missing_ok=True)  # rows of the replaced store
        if "parts" not in old:
            logger.warning("the arrays of the replaced store %s no longer belong to it", prefix)
    known = read_deleted(prefix, metadata)
    if deleted is not None and len(deleted):
        known = np.union1d(known, deleted)
        write_deleted(prefix, known)
    if len(known):
        metadata |= {"deleted": len(known), "deleted_checksum": deleted_checksum(prefix)}
    write_json(names.metadata, seal(metadata))
    return metadata


def _entry(prefix: str | Path, shard: Shard) -> dict[str, Any]:
    # Without its slash, a folder would mean the store with the same prefix, where there is one.
    shard_name = StoreName.of(shard.prefix)
    name = os.path.relpath(shard_name.prefix, StoreName.of(prefix).folder) + ("/" if shard_name.is_folder else "")
    digest = content_digest(shard.metadata)
    return {"prefix": name, "rows": shard.rows, "digest": digest, "first_document": shard.first_document}


def _why_not_one(prefix: str, saved: dict[int, set[int]], complete: list[int]) -> str:
    if not saved:
        first = f"{StoreName.of(prefix).shard(0, 'N')}.json"
        return f"{first} does not exist: nothing to join; name the stores, as in merge {prefix} A B"
    if complete:
        counts = " and ".join(map(str, sorted(complete)))
        return f"{prefix!r} consists of {counts} shards; remove the stale shards, then merge"
    missing = {count: sorted(set(range(count)) - shards) for count, shards in saved.items()}
    listed = "; ".join(f"of {count} shards {', '.join(map(str, ids))}" for count, ids in sorted(missing.items()))
    return f"{prefix!r} is not complete, missing are {listed}; save them first"

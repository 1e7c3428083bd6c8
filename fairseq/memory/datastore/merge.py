"""Makes one datastore of several without copying their arrays: a JSON file that lists them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import write_deleted
from fairseq.memory.datastore.layout import FORMAT_VERSION, StoreFiles
from fairseq.memory.datastore.metadata import (
    Part,
    content_digest,
    part_prefix,
    read_about,
    read_deleted,
    require_alike,
    shards_of,
)
from fairseq.memory.types import Array
from fairseq.runtime.files import locked, may_create_in, read_json, write_json

logger = logging.getLogger(__name__)

# What may differ between the shards of one store, and what describes files and not rows.
_OF_ONE = frozenset(
    "format_version complete rows keys_file values_file documents_file block_bytes checksums deleted parts shard_id "
    "num_shards first_row total_rows num_documents with_scores".split()
)
_MUST_AGREE = ("dim", "key_dtype", "value_dtype", "key_tap", "dictionary_digest", "dictionary_size", "model_digest")


def join_shards(prefix: str | Path, num_shards: int, seconds: float = 0.0) -> dict[str, Any] | None:
    """Make the store of its shards' parts, unless one is missing; returns its metadata, or None.

    Args:
        seconds: how long to wait for another shard that is doing the same.
    Raises: ValueError when the parts do not belong together; OSError when another process holds the store.
    """
    prefixes = [part_prefix(prefix, shard, num_shards) for shard in range(num_shards)]
    with locked(StoreFiles.of(prefix, "float32").lock, f"datastore {str(prefix)!r}", seconds):
        if not all(StoreFiles.of(name, "float32").metadata.exists() for name in prefixes):
            return None
        parts: list[Part] = []
        for name in prefixes:
            part = Part(name, read_about(name), sum(part.rows for part in parts))
            if part.about.get("first_row") != part.first_row:
                raise ValueError(
                    f"{name!r} was saved to begin at row {part.about.get('first_row')} of the store, and the parts "
                    f"before it hold {part.first_row}: they are of another text or model; save them again"
                )
            if parts:
                require_alike(parts[0], part, sorted((parts[0].about.keys() | part.about.keys()) - _OF_ONE))
            parts.append(part)
        return _write_whole(prefix, parts, int(parts[0].about.get("num_documents", 1)))


def merge(prefix: str | Path, stores: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Concatenate several stores, or join the shards of ``prefix`` where none is named.

    Documents are numbered on. Rows that are deleted in a store stay so. Returns: the metadata of the whole.
    Raises: ValueError when a store is missing, incomplete or does not fit the others.
    """
    if not stores:
        saved = shards_of(prefix)
        complete = [count for count, shards in saved.items() if shards == set(range(count))]
        if len(complete) != 1:
            raise ValueError(_why_not_one(str(prefix), saved, complete))
        about = join_shards(prefix, complete[0])
        assert about is not None
        return about
    names = StoreFiles.of(prefix, "float32")
    may_create_in(names.metadata.parent)
    with locked(names.lock, f"datastore {str(prefix)!r}"):
        _require_free(prefix, stores)
        parts: list[Part] = []
        deleted = [np.empty(0, np.int64)]
        rows = documents = 0
        for store in stores:
            opened = Datastore.open(store, with_keys=False)
            deleted.append(opened.deleted + rows)
            for part in opened.parts:
                moved = (part.first_row + rows, part.first_document + documents)
                parts.append(dataclasses.replace(part, first_row=moved[0], first_document=moved[1]))
                require_alike(parts[0], part, _MUST_AGREE)
            rows, documents = rows + len(opened), documents + int(opened.metadata.get("num_documents", 1))
        return _write_whole(prefix, parts, documents, np.concatenate(deleted))


def _require_free(prefix: str | Path, stores: Sequence[str | Path]) -> None:
    """Raise ValueError where the name of the whole is that of a store with arrays, or of one of its parts."""
    names = StoreFiles.of(prefix, "float32")
    taken = {os.path.abspath(store) for store in stores}
    if os.path.abspath(prefix) in taken or (names.metadata.exists() and "parts" not in read_json(names.metadata)):
        raise ValueError(f"{names.metadata} is that of a store with arrays of its own; give the whole another name")


def _write_whole(
    prefix: str | Path, parts: Sequence[Part], documents: int, deleted: Array | None = None
) -> dict[str, Any]:
    """Write the JSON file of a store made of parts, and what is deleted in it."""
    first = parts[0].about
    shared = {name for name in first.keys() - _OF_ONE if all(part.about.get(name) == first[name] for part in parts)}
    about: dict[str, Any] = {name: value for name, value in first.items() if name in shared}
    about |= {"format_version": FORMAT_VERSION, "complete": True, "rows": sum(part.rows for part in parts)}
    about |= {"num_documents": documents, "parts": [_entry(prefix, part) for part in parts]}
    names = StoreFiles.of(prefix, "float32")
    old = read_json(names.metadata) if names.metadata.exists() else None
    if old is not None and content_digest(old) != content_digest(about):
        names.deleted.unlink(missing_ok=True)  # rows of the store that was there
        if "parts" not in old:
            logger.warning("the arrays of the store that was %s are not part of it any more", prefix)
    known = read_deleted(prefix, about)
    if deleted is not None and len(deleted):
        known = np.union1d(known, deleted)
        write_deleted(prefix, known)
    if len(known):
        about["deleted"] = len(known)
    write_json(names.metadata, about)
    return about


def _entry(prefix: str | Path, part: Part) -> dict[str, Any]:
    name = os.path.relpath(part.prefix, Path(prefix).parent)
    digest = content_digest(part.about)
    return {"prefix": name, "rows": part.rows, "digest": digest, "first_document": part.first_document}


def _why_not_one(prefix: str, saved: dict[int, set[int]], complete: list[int]) -> str:
    if not saved:
        return f"there is no {prefix}.part0-of-N.json: nothing to join; name the stores, as in merge {prefix} A B"
    if complete:
        counts = " and ".join(map(str, sorted(complete)))
        return f"{prefix!r} lies in {counts} shards; remove the shards that are out of date, then merge"
    missing = {count: sorted(set(range(count)) - shards) for count, shards in saved.items()}
    listed = "; ".join(f"of {count} parts {', '.join(map(str, ids))}" for count, ids in sorted(missing.items()))
    return f"{prefix!r} is not complete, missing are {listed}; save them first"

"""The JSON file of a datastore, and stores of several shards.

A shard is a store by itself: its own arrays, metadata and checksums. The JSON file of the store lists the shards by
name, relative to its folder, with the facts that must not change: rows and digest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.foreign_formats import ForeignFiles, map_array
from fairseq.memory.datastore.layout import FORMAT_VERSION, KEY_DTYPES, STORE, StoreFiles, StoreName, require_free
from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_array
from fairseq.runtime.files import file_checksums, read_json
from fairseq.runtime.records import OBJECT, POSITIVE, Fields, read_record, require


@dataclass(frozen=True)
class Shard:
    """A part of a store with its own files, and its position in the store."""

    prefix: str
    metadata: Mapping[str, Any]
    """Content of the shard's JSON file."""
    first_row: int = 0
    first_document: int = 0

    @property
    def rows(self) -> int:
        """Number of its rows."""
        return int(self.metadata["rows"])

    @property
    def names(self) -> StoreFiles:
        """Its files."""
        return StoreFiles.of(self.prefix, self.metadata["key_dtype"])

    def keys(self) -> Array:
        """Its keys, mapped. Raises: ValueError when the file is missing or of another size."""
        return map_array(self.names.keys, (self.rows, self.metadata["dim"]), self.metadata["key_dtype"])

    def values(self) -> Array:
        """Its values, mapped. Raises: ValueError as for keys."""
        return map_array(self.names.values, (self.rows,), self.metadata["value_dtype"])

    def documents(self) -> Documents:
        """Positions of its rows in their text, in its own numbering of documents."""
        has_documents = self.metadata.get("documents_file")
        return Documents.read(self.names.documents, self.rows) if has_documents else Documents.unknown()


def shard_prefix(prefix: str | Path, shard_id: int, num_shards: int) -> str:
    """Prefix of the files of one shard."""
    return StoreName.of(prefix).shard(shard_id, num_shards)


def saved_shards(prefix: str | Path) -> dict[int, set[int]]:
    """Complete shards of a store: number of shards -> their ids."""
    return StoreName.of(prefix).shards()


def read_metadata(prefix: str | Path) -> dict[str, Any]:
    """Read ``<prefix>.json``. Raises: ValueError when it does not describe a complete store."""
    path = StoreFiles.of(prefix).metadata
    fix = "copy it again, or save the store again"
    version = read_json(path, fix).get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; save it again")
    metadata = read_record(path, STORE, fix)
    if "parts" not in metadata:
        require(metadata, Fields({"checksums": OBJECT, "block_bytes": POSITIVE}), str(path), fix)
    elif "checksums" in metadata:
        raise ValueError(f"{path} is damaged: a store of shards has no 'checksums' of its own; {fix}")
    if not metadata["complete"]:
        raise ValueError(f"datastore {str(prefix)!r} is not complete; resume with the command that saves it")
    return metadata


# What a store is of, in the order in which a difference is worth naming.
_IDENTITY = {
    "subset": "split",
    "key_tap": "kind of keys",
    "key_dtype": "type of keys",
    "dim": "width of keys",
    "model_digest": "model",
    "model_overrides": "list of model settings",
    "dictionary_digest": "dictionary",
    "text_digest": "text",
    "source_text_digest": "source text",
    "context_window": "context window",
    "add_bos_token": "use of --add-bos-token",
    "rows": "number of rows",
    "batches_digest": "cut of the text into batches",
}
_NOT_COMPARED = {"with_scores", "dictionary_size", "num_documents"}
OVERWRITE = "--overwrite-dstore"


def is_saved(prefix: str | Path, dtype: str, metadata: Mapping[str, Any], *, overwrite: bool) -> bool:
    """True if the store that a command would write is complete already; False if it is to be written.

    Args:
        dtype: type of its keys.
        metadata: facts about it; those that an existing store does not record are not compared.
        overwrite: True replaces any store of ours.
    Raises: ValueError with both values when a complete store of anything else is there, or another program's files.
    """
    require_free(prefix, dtype)
    names, wanted = StoreFiles.of(prefix, dtype), {**metadata, "key_dtype": dtype}
    if overwrite or not names.metadata.exists():
        return False
    existing = read_json(names.metadata, f"remove it, or replace the store with {OVERWRITE}")
    if not existing.get("complete"):
        return False
    for name in [*_IDENTITY, *sorted(wanted.keys() - _IDENTITY.keys() - _NOT_COMPARED)]:
        if name in wanted and name in existing and existing[name] != wanted[name]:
            raise ValueError(
                f"datastore {str(prefix)!r} is complete and its {_IDENTITY.get(name, name)} is "
                f"{_short(existing[name])}, that of this command is {_short(wanted[name])}; name another place, or "
                f"replace the store with {OVERWRITE}"
            )
    try:
        for shard in read_shards(prefix, existing):
            shard.keys()
            shard.values()
    except (ValueError, KeyError):  # its arrays are gone or cut short
        return False
    return True


def store_exists(prefix: str | Path, metadata: Mapping[str, Any]) -> bool:
    """True if a complete store with this metadata exists."""
    path = StoreFiles.of(prefix).metadata
    existing = read_json(path) if path.exists() else {}
    return bool(existing.get("complete")) and all(existing.get(name) == value for name, value in metadata.items())


def read_shards(prefix: str | Path, metadata: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The shards of a store, or itself without shards. Raises: ValueError when one is missing or has changed."""
    if "parts" not in metadata:
        return (Shard(str(prefix), metadata),)
    shards: list[Shard] = []
    whole = StoreName.of(prefix)
    file = StoreFiles.of(prefix).metadata
    for entry in metadata["parts"]:
        path = _place(whole, entry)
        metadata_path = StoreFiles.of(path).metadata
        if not metadata_path.exists():
            raise ValueError(f"{file} lists the shard {path!r}, and {metadata_path} is missing; copy it too")
        shard = Shard(path, read_metadata(path), shards[-1].first_row + shards[-1].rows if shards else 0)
        if content_digest(shard.metadata) != entry["digest"]:
            raise ValueError(
                f"{path!r} holds {shard.rows} rows other than the {entry['rows']} that {file} lists: it was "
                "rewritten; run fairseq-datastore merge again"
            )
        require_alike(Shard(str(prefix), metadata), shard, ("dim", "key_dtype", "value_dtype"))
        shards.append(Shard(path, shard.metadata, shard.first_row, int(entry["first_document"])))
    held = sum(shard.rows for shard in shards)
    if held != metadata["rows"] or [shard.rows for shard in shards] != [part["rows"] for part in metadata["parts"]]:
        raise ValueError(
            f"{file} is damaged: its shards hold {held} rows, it says {metadata['rows']}; run fairseq-datastore "
            "merge again"
        )
    return tuple(shards)


def _place(whole: StoreName, entry: Mapping[str, Any]) -> str:
    """Prefix of a shard that a store lists, relative to the folder of its JSON file.

    Earlier releases took names in a folder store as relative to the folder above it, which breaks when it is moved, and
    dropped the slash of a folder: where several stores are meant, the digest decides.
    """
    name, folders = entry["prefix"], [whole.folder]
    if whole.may_hide:
        folders.append(whole.folder.parent)
    places = [name if folder == Path() else os.path.join(folder, name) for folder in folders]
    if whole.may_hide and re.fullmatch(r"\.part\d+-of-\d+", os.path.basename(name)):
        places.append(os.path.join(whole.folder, os.path.basename(name)))
    places += [os.path.join(place, "") for place in places if not place.endswith("/")]
    found = [place for place in places if StoreFiles.of(place).metadata.exists()]
    if len(found) < 2:
        return found[0] if found else places[0]
    return next((place for place in found if digest_on_disk(place) == entry["digest"]), found[0])


def digest_on_disk(prefix: str | Path) -> str | None:
    """Identity of the content that a store's JSON file records; None where it is missing or damaged."""
    try:
        return content_digest(read_metadata(prefix))
    except (ValueError, OSError):
        return None


def store_files(prefix: str | Path) -> list[Path]:
    """The existing files that an evaluation reads: of a store and of its shards, or of one of another program."""
    if not StoreFiles.of(prefix).metadata.exists():
        foreign = ForeignFiles.find(prefix, "float16")
        return [path for path in (foreign.keys, foreign.values) if path.is_file()]
    parts = read_shards(prefix, read_metadata(prefix))
    prefixes = dict.fromkeys([str(prefix), *(shard.prefix for shard in parts)])
    names = [StoreFiles.of(each, dtype) for each in prefixes for dtype in KEY_DTYPES]
    files = (path for each in names for path in (each.keys, each.values, each.documents, each.deleted, each.metadata))
    return [path for path in dict.fromkeys(files) if path.is_file()]


def content_digest(metadata: Mapping[str, Any]) -> str | None:
    """Identity of the content: a digest of the checksums of keys and values; None without checksums."""
    if "parts" in metadata:
        content: object = [entry["digest"] for entry in metadata["parts"]]
    else:
        sums = metadata.get("checksums")
        if not sums:
            return None
        content = {shard: sums[shard] for shard in ("keys", "values")}
    return hashlib.sha256(repr(content).encode()).hexdigest()


def require_alike(one: Shard, other: Shard, names: Sequence[str]) -> None:
    """Raise ValueError with both values where two shards differ; facts that one of them lacks are not compared."""
    for name in names:
        a, b = one.metadata.get(name), other.metadata.get(name)
        if a is not None and b is not None and a != b:
            fix = "use fairseq-datastore convert --dtype" if name == "key_dtype" else "save one again"
            raise ValueError(
                f"{one.prefix!r} and {other.prefix!r} cannot be one datastore: {name} is {_short(a)} in the first and "
                f"{_short(b)} in the second; {fix}"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}...'"


def read_deleted(prefix: str | Path, metadata: Mapping[str, Any]) -> Array:
    """Deleted rows, int64, ascending. Raises: ValueError when the file is missing or damaged.

    The file holds at least as many rows as the metadata count, because it is written first.
    """
    path, counted = StoreFiles.of(prefix).deleted, int(metadata.get("deleted", 0))
    if not path.exists():
        if counted:
            raise ValueError(f"{counted} rows of datastore {str(prefix)!r} are deleted, and {path} is missing; copy it")
        return np.empty(0, np.int64)
    rows = read_array(path, "is not a list of rows", "copy it again")
    fits = rows.dtype == np.int64 and rows.ndim == 1 and len(rows) >= counted and (np.diff(rows) > 0).all()
    if not fits or (len(rows) and (rows[0] < 0 or rows[-1] >= metadata["rows"])):
        raise ValueError(
            f"{path} holds {rows.shape} {rows.dtype}, not the {counted} or more deleted rows of {metadata['rows']}: "
            "it is damaged or of another store; copy it again"
        )
    # More rows than the metadata count: the command that deleted them was killed before it wrote their checksum.
    if len(rows) == counted and metadata.get("deleted_checksum") not in (None, deleted_checksum(prefix)):
        raise ValueError(f"{path} is damaged: its checksum differs from the one in its JSON file; copy it again")
    return rows


def deleted_checksum(prefix: str | Path) -> str:
    """CRC-32 of the file that lists the deleted rows."""
    path = StoreFiles.of(prefix).deleted
    return next(file_checksums(path, max(1, path.stat().st_size)))


def all_deleted(prefix: str | Path, metadata: Mapping[str, Any], shards: Sequence[Shard]) -> Array:
    """Rows deleted in a store or in one of its shards, int64, ascending."""
    lists = [read_deleted(prefix, metadata)]
    if "parts" in metadata:
        lists += [read_deleted(shard.prefix, shard.metadata) + shard.first_row for shard in shards]
    return np.unique(np.concatenate(lists)) if len(lists) > 1 else lists[0]


def keys_of(shards: Sequence[Shard]) -> ChunkedArray:
    """The keys of all shards."""
    return ChunkedArray([shard.keys() for shard in shards], shards[0].metadata["key_dtype"])


def values_of(shards: Sequence[Shard]) -> ChunkedArray:
    """The values of all shards."""
    return ChunkedArray([shard.values() for shard in shards])


def documents_of(shards: Sequence[Shard]) -> Documents:
    """Positions of the rows of all shards in their texts."""
    return Documents.concatenated((shard.documents(), shard.first_row, shard.first_document) for shard in shards)

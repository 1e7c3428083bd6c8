"""The JSON file of a datastore, and stores whose arrays lie in several files.

A part is a store by itself: its own arrays, metadata and checksums. The JSON file of the whole lists the parts by name,
relative to its folder, with what must not change: rows and digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.foreign_formats import VALUE_DTYPES, map_array
from fairseq.memory.datastore.layout import FORMAT_VERSION, KEY_DTYPES, StoreFiles
from fairseq.memory.types import Array
from fairseq.runtime.files import read_json


@dataclass(frozen=True)
class Part:
    """Arrays of a store that lie in files of their own, and their place in the whole."""

    prefix: str
    about: Mapping[str, Any]
    """Content of the part's JSON file."""
    first_row: int = 0
    first_document: int = 0

    @property
    def rows(self) -> int:
        """Its rows."""
        return int(self.about["rows"])

    @property
    def names(self) -> StoreFiles:
        """Its files."""
        return StoreFiles.of(self.prefix, self.about["key_dtype"])

    def keys(self) -> Array:
        """Its keys, mapped. Raises: ValueError when the file is missing or of another size."""
        return map_array(self.names.keys, (self.rows, self.about["dim"]), self.about["key_dtype"])

    def values(self) -> Array:
        """Its values, mapped. Raises: as keys."""
        return map_array(self.names.values, (self.rows,), self.about["value_dtype"])

    def documents(self) -> Documents:
        """Positions of its rows in their text, in its own numbering of documents."""
        has_documents = self.about.get("documents_file")
        return Documents.read(self.names.documents, self.rows) if has_documents else Documents.unknown()


def part_prefix(prefix: str | Path, shard_id: int, num_shards: int) -> str:
    """Prefix of the files of one shard."""
    return f"{prefix}.part{shard_id}-of-{num_shards}"


def shards_of(prefix: str | Path) -> dict[int, set[int]]:
    """Shards of a store that are complete: number of shards -> their ids."""
    folder, name = Path(prefix).parent, re.escape(Path(prefix).name)
    found: dict[int, set[int]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(name + r"\.part(\d+)-of-(\d+)\.json", path.name)
        if match:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    return found


def read_about(prefix: str | Path) -> dict[str, Any]:
    """Read ``<prefix>.json``. Raises: ValueError when it is not that of a complete store."""
    path = StoreFiles.of(prefix, "float32").metadata
    about = read_json(path)
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {about.get('format_version')!r}; this release reads {FORMAT_VERSION}")
    try:
        rows, dim, dtype, value_dtype = (about[name] for name in ("rows", "dim", "key_dtype", "value_dtype"))
        complete = about["complete"]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; it is damaged or not a datastore's: save it again") from None
    if dtype not in KEY_DTYPES or value_dtype not in VALUE_DTYPES:
        known = f"{', '.join(KEY_DTYPES)} and {', '.join(VALUE_DTYPES)}"
        raise ValueError(f"{path}: keys of type {dtype!r}, values of {value_dtype!r}; known: {known}")
    if not (isinstance(rows, int) and isinstance(dim, int) and dim > 0):
        raise ValueError(f"{path}: {rows!r} rows of width {dim!r}; it is damaged: save it again")
    if not complete:
        raise ValueError(f"datastore {str(prefix)!r} is not complete; resume with the command that saves it")
    return about


def is_there(prefix: str | Path, about: Mapping[str, Any]) -> bool:
    """True if a complete store with this metadata exists."""
    path = StoreFiles.of(prefix, "float32").metadata
    existing = read_json(path) if path.exists() else {}
    return bool(existing.get("complete")) and all(existing.get(name) == value for name, value in about.items())


def parts_of(prefix: str | Path, about: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of a store, itself when it has none. Raises: ValueError when one is missing or has changed."""
    if "parts" not in about:
        return (Part(str(prefix), about),)
    found: list[Part] = []
    for entry in about["parts"]:
        path = f"{Path(prefix).parent / entry['prefix']}"
        metadata = StoreFiles.of(path, "float32").metadata
        if not metadata.exists():
            raise ValueError(f"{prefix}.json lists the part {path!r}, and {metadata} is missing; copy it too")
        part = Part(path, read_about(path), found[-1].first_row + found[-1].rows if found else 0)
        if content_digest(part.about) != entry["digest"]:
            raise ValueError(
                f"{path!r} holds {part.rows} rows other than the {entry['rows']} that {prefix}.json lists: it was "
                "written again; run fairseq-datastore merge again"
            )
        require_alike(Part(str(prefix), about), part, ("dim", "key_dtype", "value_dtype"))
        found.append(Part(path, part.about, part.first_row, int(entry["first_document"])))
    return tuple(found)


def content_digest(about: Mapping[str, Any]) -> str | None:
    """Identity of the content: a digest of the checksums of keys and values; None without checksums."""
    if "parts" in about:
        content: object = [entry["digest"] for entry in about["parts"]]
    else:
        sums = about.get("checksums")
        if not sums:
            return None
        content = {part: sums[part] for part in ("keys", "values")}
    return hashlib.sha256(repr(content).encode()).hexdigest()


def require_alike(one: Part, other: Part, names: Sequence[str]) -> None:
    """Raise ValueError with both values where two parts differ; facts that one of them lacks are not compared."""
    for name in names:
        a, b = one.about.get(name), other.about.get(name)
        if a is not None and b is not None and a != b:
            way_out = "fairseq-datastore convert --dtype makes them alike" if name == "key_dtype" else "save one again"
            raise ValueError(
                f"{one.prefix!r} and {other.prefix!r} cannot be one datastore: {name} is {_short(a)} in the first and "
                f"{_short(b)} in the second; {way_out}"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:27]}...'"


def read_deleted(prefix: str | Path, about: Mapping[str, Any]) -> Array:
    """Rows that are deleted, int64, rising. Raises: ValueError when the file is missing or damaged.

    The file holds at least as many as the metadata count: it is written first.
    """
    path, counted = StoreFiles.of(prefix, "float32").deleted, int(about.get("deleted", 0))
    if not path.exists():
        if counted:
            raise ValueError(f"{counted} rows of datastore {str(prefix)!r} are deleted, and {path} is missing; copy it")
        return np.empty(0, np.int64)
    try:
        rows: Array = np.load(path)
    except ValueError as error:
        raise ValueError(f"{path} is no list of rows ({error}); copy it again") from None
    fits = rows.dtype == np.int64 and rows.ndim == 1 and len(rows) >= counted and (np.diff(rows) > 0).all()
    if not fits or (len(rows) and (rows[0] < 0 or rows[-1] >= about["rows"])):
        raise ValueError(
            f"{path} holds {rows.shape} {rows.dtype}, not the {counted} or more deleted rows of {about['rows']}: it is "
            "damaged or of another store; copy it again"
        )
    return rows


def all_deleted(prefix: str | Path, about: Mapping[str, Any], parts: Sequence[Part]) -> Array:
    """Rows that are deleted in a store or in one of its parts, int64, rising."""
    lists = [read_deleted(prefix, about)]
    if "parts" in about:
        lists += [read_deleted(part.prefix, part.about) + part.first_row for part in parts]
    return np.unique(np.concatenate(lists)) if len(lists) > 1 else lists[0]


def keys_of(parts: Sequence[Part]) -> ChunkedArray:
    """The keys of all parts."""
    return ChunkedArray([part.keys() for part in parts], parts[0].about["key_dtype"])


def values_of(parts: Sequence[Part]) -> ChunkedArray:
    """The values of all parts."""
    return ChunkedArray([part.values() for part in parts])


def documents_of(parts: Sequence[Part]) -> Documents:
    """Positions of the rows of all parts in their texts."""
    return Documents.joined((part.documents(), part.first_row, part.first_document) for part in parts)

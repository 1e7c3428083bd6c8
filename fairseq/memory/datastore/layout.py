"""Names, types and schemas of the files that make up a datastore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.runtime.files import read_json
from fairseq.runtime.records import CRC, FLAG, OBJECT, POSITIVE, SUMS, TEXT, WHOLE, Fields, Items, Nullable, one_of

FORMAT_VERSION = 1


KEY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype("uint16"),
}
"""Types of keys and their numpy types; numpy has no bfloat16, so its 16 bits are uint16."""
VALUE_DTYPES = ("int64", "int32", "int16")
"""Types of values; ours are int64."""

_TYPES = {"dim": POSITIVE, "key_dtype": one_of(*KEY_DTYPES), "value_dtype": one_of(*VALUE_DTYPES)}
_PART = Fields({"prefix": TEXT, "rows": WHOLE, "digest": Nullable(TEXT), "first_document": WHOLE})

STORE = Fields(
    {"format_version": POSITIVE, "complete": FLAG, "rows": WHOLE, **_TYPES},
    {
        "block_bytes": POSITIVE,
        "checksums": Fields({"keys": Items(CRC), "values": Items(CRC)}, {"documents": Items(CRC)}),
        "parts": Items(_PART, at_least=1),
        "deleted": WHOLE,
        "deleted_checksum": CRC,
        "generation": WHOLE,
        "compaction": Fields(
            {"request": TEXT, "rows_before": WHOLE, "replaced": Items(TEXT)},
            {"replaced_digests": Items(Nullable(TEXT))},
        ),
        "first_row": WHOLE,
        **{name: Nullable(TEXT) for name in ("keys_file", "values_file", "documents_file", "key_tap")},
        **{name: Nullable(TEXT) for name in ("dictionary_digest", "model_digest", "model_dtype", "batches_digest")},
        **{name: Nullable(WHOLE) for name in ("dictionary_size", "context_window", "num_documents")},
    },
)
"""``<prefix>.json``; a store has either ``parts`` or ``checksums``."""

PROGRESS = Fields(
    {
        "signature": Fields({"rows": Nullable(WHOLE), "metadata": OBJECT, **_TYPES}),
        "rows_done": WHOLE,
        "cursor": Nullable(OBJECT),
        "checksums": Fields({"keys": SUMS, "values": SUMS}),
        "block_bytes": POSITIVE,
        "finishing": FLAG,
    },
    {"documents": Items(CRC)},
)
"""``<prefix>.progress.json`` of a store that is being saved."""


_OWN = "datastore"  # begins the names of our files in a folder
_FOLDER_ARRAYS = {"keys": "keys.npy", "values": "vals.npy", "documents": "docs.npy"}
# Files of a store with the prefix FOLDER/datastore.
_PREFIX_FILES = tuple(_OWN + end for end in ("_vals.npy", "_vals.npy.tmp", ".deleted.npy"))
_FOLDER_FILES = {*_FOLDER_ARRAYS.values(), "deleted.npy", f"{_OWN}.json", _OWN}


@dataclass(frozen=True)
class StoreName:
    """The one mapping from a user's PREFIX to names of files: those of a store, its shards and what lies beside it.

    | | ``name`` | ``name/`` |
    |---|---|---|
    | arrays | ``name_keys.npy`` | ``name/keys.npy`` |
    | JSON | ``name.json`` | ``name/datastore.json`` |
    | shards | ``name.part0-of-2`` | ``name/datastore.part0-of-2`` |
    | manifest | ``name.run.json`` | ``name/datastore.run.json`` |
    | clusters | ``name.clusters.npz`` | ``name/clusters.npz`` |
    """

    stem: Path
    """What the names of its JSON file and shards begin with."""
    is_folder: bool
    """True if its arrays have kNN-MT's names."""

    @classmethod
    def of(cls, prefix: str | os.PathLike[str]) -> StoreName:
        """The name that a PREFIX means.

        A folder is one with a slash at its end, one that holds a store, or a file of such a store in it.
        Raises: ValueError for the root of the file system, and for no name at all.
        """
        text = os.fspath(prefix)
        folder, name = os.path.split(text)
        if name in ("", ".", ".."):
            folder = text
        elif not (name in _FOLDER_FILES and _has_store(folder)):
            if os.path.exists(f"{text}.json") or not _has_store(text):
                return cls(Path(text), False)
            folder = text
        if not text or os.path.realpath(folder or ".") == os.path.sep:
            raise ValueError(f"{text!r} is no name of a datastore; give a prefix or a folder, as in /data/store/")
        # FOLDER/datastore, as a prefix, has the same JSON file: then the other files decide.
        prefixed, values = _exists(folder, _PREFIX_FILES), _exists(folder, ("vals.npy", "vals.npy.tmp"))
        if name == _OWN:
            return cls(Path(folder, _OWN), not prefixed and (values or _exists(folder, ("deleted.npy",))))
        return cls(Path(folder, _OWN), values or not prefixed)

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.stem.parent

    @property
    def prefix(self) -> str:
        """The PREFIX that means it whatever else is there: a folder with a slash at its end."""
        return os.path.join(self.folder, "") if self.is_folder else str(self.stem)

    def side_file(self, ending: str) -> Path:
        """A file beside the store, by its ending: ``run.json``, ``clusters.npz``."""
        if self.is_folder and ending.endswith((".npy", ".npz")):
            return self.folder / ending
        return Path(f"{self.stem}.{ending}")

    def existing_side_file(self, ending: str) -> Path:
        """The same, or where only that exists the file that an earlier release hid in a folder: ``.clusters.npz``."""
        new, old = self.side_file(ending), self.folder / f".{ending}"
        return old if self.may_hide and old.exists() and not new.exists() else new

    @property
    def may_hide(self) -> bool:
        """True if an earlier release gave files beside the store names that begin with a dot."""
        return self.stem.name == _OWN

    def shard(self, shard_id: int | str, num_shards: int | str) -> str:
        """Prefix of one shard; in a folder, that of an earlier release (``.part0-of-2``) where one was begun."""
        ending = f".part{shard_id}-of-{num_shards}"
        new, old = f"{self.stem}{ending}", os.path.join(self.folder, ending)
        is_old = self.may_hide and _is_begun(old) and not _is_begun(new)
        return old if is_old else new

    def shards(self) -> dict[int, set[int]]:
        """Complete shards beside the store: number of shards -> their ids."""
        begin = re.escape(self.stem.name) + ("|" if self.may_hide else "")
        found: dict[int, set[int]] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = re.fullmatch(rf"(?:{begin})\.part(\d+)-of-(\d+)\.json", path.name)
            if match:
                found.setdefault(int(match[2]), set()).add(int(match[1]))
        return found


def _is_begun(prefix: str) -> bool:
    return any(os.path.exists(f"{prefix}{end}") for end in (".json", ".progress.json"))


def _has_store(folder: str) -> bool:
    """True if a folder holds our JSON file."""
    return _is_begun(os.path.join(folder, _OWN))


def _exists(folder: str, names: Iterable[str]) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in names)


@dataclass(frozen=True)
class StoreFiles:
    """The names of a store's files."""

    keys: Path
    values: Path
    documents: Path
    deleted: Path
    metadata: Path
    progress: Path
    lock: Path

    @classmethod
    def of(cls, prefix: str | Path, dtype: str = "float32") -> StoreFiles:
        """The names for a prefix (see ``StoreName``) and a key type."""
        name = StoreName.of(prefix)
        beside = {"deleted": "deleted.npy", "metadata": "json", "progress": "progress.json", "lock": "lock"}
        files = {array: name.side_file(ending) for array, ending in beside.items()}
        infix = {"float16": "-fp16", "bfloat16": "-bf16"}.get(dtype, "")
        plain = {"keys": f"{infix}_keys.npy", "values": "_vals.npy", "documents": "_docs.npy"}
        for array, ending in plain.items():
            files[array] = name.folder / _FOLDER_ARRAYS[array] if name.is_folder else Path(f"{name.stem}{ending}")
        return cls(**files)


def side_file(prefix: str | Path, ending: str) -> str:
    """Name of a file beside a store: its run manifest (``run.json``), its clusters (``clusters.npz``)."""
    return str(StoreName.of(prefix).side_file(ending))


def store_of_file(path: Path) -> str | None:
    """The prefix of the store of ours that a file belongs to, by its name; None where there is no such store."""
    name = path.name
    for ending in (
        ".deleted.npy",
        *(f"{infix}_keys.npy" for infix in ("-fp16", "-bf16", "")),
        "_vals.npy",
        "_docs.npy",
    ):
        stem = str(path.with_name(name.removesuffix(ending))) if name.endswith(ending) and name != ending else ""
        if stem and _is_begun(stem):
            return stem
    return StoreName.of(path).prefix if name in _FOLDER_FILES and _has_store(str(path.parent)) else None


def require_free(
    prefix: str | Path, dtype: str, arrays: tuple[str, ...] = ("keys", "values", "documents", "deleted")
) -> None:
    """Raise ValueError where files of other programs have the names that a store would write, or remove.

    Ours have a JSON file that lists them; while a store is being saved, its progress.
    """
    names = StoreFiles.of(prefix, dtype)
    if names.progress.exists():
        return
    existing = [path for path in (getattr(names, array) for array in arrays) if path.exists()]
    if names.metadata.exists():
        try:
            metadata = read_json(names.metadata)
        except ValueError:  # damaged: the store is saved again
            return
        if "format_version" not in metadata:
            existing.append(names.metadata)
        elif metadata.get("values_file", names.values.name) == names.values.name:
            return
    if existing:
        listed = ", ".join(str(path) for path in existing)
        raise ValueError(
            f"{listed} would be overwritten and {'is' if len(existing) == 1 else 'are'} of no datastore of ours "
            f"({names.metadata} does not list them); move them away, or name another prefix or folder"
        )

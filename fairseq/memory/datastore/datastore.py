"""A datastore on disk: one key and one value (the token that came next) per position, and a JSON file that says what.

The arrays are headerless and row-major, as kNN-LM and TRIME write them: ``<prefix>_keys.npy`` (float32),
``<prefix>-fp16_keys.npy`` or ``<prefix>-bf16_keys.npy``, and ``<prefix>_vals.npy`` (int64). ``<prefix>.json`` holds the
rows, the width, the types, the tap of the keys and a checksum per block, or names the shards whose rows, one after the
other, are the store. ``writer.py`` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.config import SAVES_EITHER
from fairseq.memory.datastore.describe import StoreDescription, StoreHints, describe
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.foreign_formats import ForeignFiles, map_keys, map_values
from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.datastore.metadata import (
    Shard,
    all_deleted,
    content_digest,
    documents_of,
    keys_of,
    read_shards,
    values_of,
)
from fairseq.memory.datastore.verify import damage
from fairseq.memory.types import Array

logger = logging.getLogger(__name__)

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Datastore:
    """An opened datastore. Its arrays stay on disk, memory-mapped, unless ``in_memory`` is called.

    ```python
    store = Datastore.open("store")
    assert (len(store), store.dim, store.keys.dtype) == (1000, 16, "float32")
    store.values.take(torch.tensor([0, 3]))  # the tokens that came next, rows 0 and 3
    ```
    """

    prefix: str
    keys: ChunkedArray
    """float32, float16 or bfloat16, (rows, dim)."""
    values: ChunkedArray
    """int64, int32 or int16, (rows,)."""
    metadata: Mapping[str, Any]
    """Content of ``PREFIX.json``; empty for headerless files."""
    has_keys: bool = True
    """False if the keys were not opened, because scores come from the index."""
    deleted: Array = field(default_factory=lambda: _NONE)
    """int64, ascending: rows that are never found."""
    shards: tuple[Shard, ...] = ()
    """The files it is made of; empty for headerless files."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_alive(self) -> int:
        """Number of rows that are not deleted."""
        return len(self) - len(self.deleted)

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    @property
    def digest(self) -> str | None:
        """Digest of the content, whatever is deleted; None for headerless files."""
        return content_digest(self.metadata)

    @classmethod
    def open(cls, prefix: str | Path, hints: StoreHints | None = None, *, with_keys: bool = True) -> Datastore:
        """Open a store of ours, or with hints also arrays that another program wrote.

        Args:
            prefix: start of the files' names; for other programs the folder, where they name it so.
            hints: facts that the files may lack (see ``describe``); None opens only a store that describes itself.
            with_keys: False never touches the keys, which may then be missing.
        Raises: ValueError when the store is missing, incomplete, empty, damaged or of another type or size than
            stated.
        """
        description = describe(prefix, hints, with_keys=with_keys)
        if description.foreign is not None:
            return cls._of_foreign(description, description.foreign, with_keys=with_keys)
        metadata = description.metadata
        shards = read_shards(prefix, metadata)
        values = values_of(shards)
        keys = keys_of(shards) if with_keys else _no_keys(metadata["rows"], metadata["dim"], metadata["key_dtype"])
        return cls(str(prefix), keys, values, metadata, with_keys, all_deleted(prefix, metadata, shards), shards)

    @classmethod
    def _of_foreign(cls, description: StoreDescription, files: ForeignFiles, *, with_keys: bool) -> Datastore:
        hints, prefix = description.hints, description.prefix
        if not with_keys:
            assert hints.size is not None
            assert hints.dim is not None
            values = ChunkedArray.of(map_values(files.values, hints.size))
            return cls(prefix, _no_keys(hints.size, hints.dim, hints.key_dtype), values, {}, False)
        keys, dtype = map_keys(files, hints.dim, hints.size, hints.key_dtype)
        if not keys[-1].any():
            logger.warning(
                "the last key of %s is all zeros: the program that wrote it may have stopped early, or --dstore-size "
                "was larger than the split; verify before you trust figures",
                files.keys,
            )
        return cls(prefix, ChunkedArray([keys], dtype), ChunkedArray.of(map_values(files.values, len(keys))), {})

    def require(
        self,
        *,
        dim: int | None = None,
        size: int | None = None,
        key_tap: str | None = None,
        dictionary_digest: str | None = None,
        dictionary_size: int | None = None,
        saved_by: str = SAVES_EITHER,
    ) -> Datastore:
        """Check that the store fits its user; facts that the files lack are not compared. Returns the store itself.

        Args:
            saved_by: command that makes such a store, for messages.
        Raises: ValueError with both values.
        """
        name = f"datastore {self.prefix!r}"
        if dim is not None and dim != self.dim:
            raise ValueError(
                f"{name} has keys of width {self.dim}; the model makes {dim}: save one of this model with {saved_by}"
            )
        if size is not None and size != len(self):
            raise ValueError(f"{name} has {len(self)} rows; --dstore-size says {size}: leave the flag out")
        saved_tap = self.metadata.get("key_tap")
        if key_tap is not None and saved_tap is not None and key_tap != saved_tap:
            raise ValueError(
                f"{name} holds keys of {saved_tap}; --knn-keytype says {key_tap}: give {saved_tap}, or save it again"
            )
        if dictionary_size is not None:
            self._require_dictionary(name, dictionary_digest, dictionary_size)
        return self

    def _require_dictionary(self, name: str, digest: str | None, size: int) -> None:
        saved_digest, saved_size = self.metadata.get("dictionary_digest"), self.metadata.get("dictionary_size")
        if digest is not None and saved_digest is not None and digest != saved_digest:
            raise ValueError(
                f"{name} was saved with another dictionary ({saved_size} types, digest {saved_digest[:12]}) than the "
                f"data's ({size} types, digest {digest[:12]}); use the store's dictionary or save it again"
            )
        if self.values.dtype == "int16" and size > np.iinfo(np.int16).max:
            raise ValueError(
                f"{name} keeps its values as int16, which wraps above {np.iinfo(np.int16).max}, and the dictionary has "
                f"{size} types: its tokens are not what was read; save the store again"
            )
        if not self.metadata:
            low, high = min(p.min() for p in self.values.chunks), max(p.max() for p in self.values.chunks)
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} holds tokens {low} to {high}, the dictionary has {size} types: it is of another "
                    "dictionary, or --dstore-size, --dstore-fp16 or the width is wrong"
                )

    @property
    def has_documents(self) -> bool:
        """True if the files record the document of each row."""
        return any(shard.metadata.get("documents_file") for shard in self.shards)

    def take_keys(self, ids_N: Array) -> Array:
        """Keys of some rows as float32, (N, dim); read in file order, each row once."""
        return np.asarray(self.keys.take(ids_N).numpy())

    @cached_property
    def documents(self) -> Documents:
        """Positions of the rows in their text. Raises: ValueError when the table is damaged."""
        return documents_of(self.shards) if self.shards else Documents.unknown()

    def where(self, ids_N: Tensor | Array) -> tuple[Array, Array]:
        """Document of each row and offset of its value in it, int64; -1 for the id -1."""
        return self.documents.where(np.asarray(ids_N))

    def context(self, ids_N: Tensor | Array, *, before: int, after: int) -> Tensor:
        """Text around some rows: int64 (N, before + 1 + after), each row's value in column ``before``.

        -1 where the store has no token: beyond the document, before the first row, at a deleted row, or for the id -1.
        """
        ids_N = np.asarray(ids_N)
        steps_C = np.arange(-before, after + 1)
        row_NC = ids_N[:, None] + steps_C
        in_store_NC = (ids_N[:, None] >= 0) & (row_NC >= 0) & (row_NC < len(self))
        document_N, offset_N = self.where(ids_N)
        document_NC, offset_NC = self.where(np.where(in_store_NC, row_NC, -1))
        keep_NC = in_store_NC & (document_NC == document_N[:, None]) & (offset_NC == offset_N[:, None] + steps_C)
        keep_NC &= ~np.isin(row_NC, self.deleted)
        token_NC = torch.full(row_NC.shape, -1)
        token_NC[torch.from_numpy(keep_NC)] = self.values.take(row_NC[keep_NC])
        return token_NC

    def verify(self) -> None:
        """Compare every block with its checksum. Raises: ValueError naming the file and the bytes that differ."""
        if not self.shards:
            raise ValueError(f"datastore {self.prefix!r} has no checksums; headerless files cannot be verified")
        for line in damage(self.shards):
            raise ValueError(line)

    def in_memory(self) -> Datastore:
        """The same store with its arrays read into memory."""
        keys = self.keys.in_memory() if self.has_keys else self.keys
        values = self.values.in_memory()
        return Datastore(self.prefix, keys, values, self.metadata, self.has_keys, self.deleted, self.shards)


def _no_keys(rows: int, dim: int, dtype: str) -> ChunkedArray:
    """Stands for keys that must not be read; takes no memory."""
    return ChunkedArray([np.broadcast_to(np.zeros(dim, KEY_DTYPES[dtype]), (rows, dim))], dtype)

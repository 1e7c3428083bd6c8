"""A datastore on disk: one key and one value (the token that came next) per position, and a JSON file that says what.

The arrays are headerless and row-major, as kNN-LM and TRIME write them: ``<prefix>_keys.npy`` (float32),
``<prefix>-fp16_keys.npy`` or ``<prefix>-bf16_keys.npy``, and ``<prefix>_vals.npy`` (int64). ``<prefix>.json`` holds the
rows, the width, the types, where the keys come from and a checksum per block, or names the parts whose rows, one behind
the other, are the store. ``writer.py`` writes them.
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
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.foreign_formats import OtherFiles, map_keys, map_values
from fairseq.memory.datastore.layout import KEY_DTYPES, StoreFiles
from fairseq.memory.datastore.metadata import (
    Part,
    all_deleted,
    content_digest,
    documents_of,
    keys_of,
    parts_of,
    read_about,
    shards_of,
    values_of,
)
from fairseq.memory.datastore.verify import damage
from fairseq.memory.types import Array
from fairseq.runtime.files import read_json

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
    parts: tuple[Part, ...] = ()
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
        """SHA-256 that identifies the content, whatever rows are deleted; None for headerless files."""
        return content_digest(self.metadata)

    @classmethod
    def open(cls, prefix: str | Path, *, fp16: bool = False, bf16: bool = False, with_keys: bool = True) -> Datastore:
        """Open a store by its metadata, ``PREFIX.json``.

        Args:
            fp16: require float16 keys; otherwise the metadata decide.
            bf16: require bfloat16 keys.
            with_keys: False never reads the keys, which may then be missing.
        Raises: ValueError when the store is missing, incomplete, empty, damaged or of the other key type.
        """
        if not StoreFiles.of(prefix, "float32").metadata.exists():
            raise ValueError(_why_not_there(prefix))
        about = read_about(prefix)
        dtype = about["key_dtype"]
        for flag, expected, wanted in (("fp16", "float16", fp16), ("bf16", "bfloat16", bf16)):
            if wanted and dtype != expected:
                raise ValueError(
                    f"datastore {str(prefix)!r} holds {dtype} keys and --dstore-{flag} was given; leave it out"
                )
        parts = parts_of(prefix, about)
        values = values_of(parts)
        keys = keys_of(parts) if with_keys else _no_keys(about["rows"], about["dim"], dtype)
        return cls(str(prefix), keys, values, about, with_keys, all_deleted(prefix, about, parts), parts)

    @classmethod
    def open_headerless(
        cls,
        prefix: str | Path,
        *,
        dim: int | None = None,
        size: int | None = None,
        fp16: bool = False,
        bf16: bool = False,
        with_keys: bool = True,
    ) -> Datastore:
        """Open files of kNN-LM, TRIME, kNN-MT or knn-transformers, most of which do not say what they hold.

        Args:
            prefix: start of the file names, or their folder.
            dim: width of the keys, unless the files say it.
            size: number of rows; by default computed from the file sizes.
            fp16: the keys are float16: TRIME's names and int64 values, or kNN-LM's names and int16 values.
            bf16: the keys are bfloat16.
            with_keys: False never reads the keys, which may then be missing; ``size`` and ``dim`` must be given.
        Raises: ValueError when the files are missing or their sizes do not fit.
        """
        dtype = "float16" if fp16 else "bfloat16" if bf16 else "float32"
        files = OtherFiles.find(prefix, dtype)
        if not with_keys:
            if not files.values.exists() or size is None or dim is None:
                raise ValueError(_why_not_there(prefix))
            return cls(
                str(prefix), _no_keys(size, dim, dtype), ChunkedArray.of(map_values(files.values, size)), {}, False
            )
        if not files.present():
            raise ValueError(_why_not_there(prefix))
        keys, dtype = map_keys(files, dim, size, dtype)
        if not keys[-1].any():
            logger.warning(
                "the last key of %s is all zeros: the program that wrote it may have stopped early, or --dstore-size "
                "was larger than the split; verify before you trust figures",
                files.keys,
            )
        return cls(str(prefix), ChunkedArray([keys], dtype), ChunkedArray.of(map_values(files.values, len(keys))), {})

    @classmethod
    def open_any(
        cls,
        prefix: str | Path,
        *,
        dim: int | None = None,
        size: int | None = None,
        fp16: bool = False,
        bf16: bool = False,
        with_keys: bool = True,
    ) -> Datastore:
        """Open a store with metadata, or files of another program whose sizes are known. Raises: as both."""
        if not StoreFiles.of(prefix, "float32").metadata.exists():
            told = OtherFiles.find(prefix, "float16" if fp16 else "float32").tell_their_sizes
            if told or dim is not None:
                return cls.open_headerless(prefix, dim=dim, size=size, fp16=fp16, bf16=bf16, with_keys=with_keys)
        return cls.open(prefix, fp16=fp16, bf16=bf16, with_keys=with_keys)

    def require(
        self,
        *,
        dim: int | None = None,
        size: int | None = None,
        key_tap: str | None = None,
        dictionary_digest: str | None = None,
        dictionary_size: int | None = None,
    ) -> Datastore:
        """Check that the store fits its user; unknown properties are not compared. Returns the store itself.

        Raises: ValueError with both values.
        """
        name = f"datastore {self.prefix!r}"
        if dim is not None and dim != self.dim:
            raise ValueError(
                f"{name} has keys of width {self.dim}; the model makes {dim}: save one with this model "
                "(--save-knnlm-dstore)"
            )
        if size is not None and size != len(self):
            raise ValueError(f"{name} has {len(self)} rows; --dstore-size says {size}: leave the flag out")
        saved_tap = self.metadata.get("key_tap")
        if key_tap is not None and saved_tap is not None and key_tap != saved_tap:
            raise ValueError(
                f"{name} holds keys of {saved_tap}; --knn-keytype says {key_tap}: give {saved_tap}, or save it anew"
            )
        if dictionary_size is not None:
            self._require_dictionary(name, dictionary_digest, dictionary_size)
        return self

    def _require_dictionary(self, name: str, digest: str | None, size: int) -> None:
        saved_digest, saved_size = self.metadata.get("dictionary_digest"), self.metadata.get("dictionary_size")
        if digest is not None and saved_digest is not None and digest != saved_digest:
            raise ValueError(
                f"{name} was saved with another dictionary ({saved_size} types, digest {saved_digest[:12]}) than the "
                f"data's ({size} types, digest {digest[:12]}); binarise with the store's dictionary or save anew"
            )
        if self.values.dtype == "int16" and size > np.iinfo(np.int16).max:
            raise ValueError(
                f"{name} keeps its values as int16, which wraps above {np.iinfo(np.int16).max}, and the dictionary has "
                f"{size} types: its tokens are not what was read; save the store again"
            )
        if not self.metadata:
            low, high = min(p.min() for p in self.values.parts), max(p.max() for p in self.values.parts)
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} holds tokens {low} to {high}, the dictionary has {size} types: it is of another "
                    "dictionary, or --dstore-size, --dstore-fp16 or the width is wrong"
                )

    @property
    def has_documents(self) -> bool:
        """True if the files say which document each row belongs to."""
        return any(part.about.get("documents_file") for part in self.parts)

    def take_keys(self, ids_N: Array) -> Array:
        """Keys of some rows as float32, (N, dim); read in file order, each row once."""
        return np.asarray(self.keys.take(ids_N).numpy())

    @cached_property
    def documents(self) -> Documents:
        """Positions of the rows in their text. Raises: ValueError when the table is damaged."""
        return documents_of(self.parts) if self.parts else Documents.unknown()

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
        if not self.parts:
            raise ValueError(f"datastore {self.prefix!r} has no checksums; headerless files cannot be verified")
        for line in damage(self.parts):
            raise ValueError(line)

    def in_memory(self) -> Datastore:
        """The same store with its arrays read into memory."""
        keys = self.keys.in_memory() if self.has_keys else self.keys
        values = self.values.in_memory()
        return Datastore(self.prefix, keys, values, self.metadata, self.has_keys, self.deleted, self.parts)


def _why_not_there(prefix: str | Path) -> str:
    """What to tell about a store that cannot be opened by its metadata."""
    found = [names for names in (StoreFiles.of(prefix, dtype) for dtype in KEY_DTYPES) if names.keys.exists()]
    saved = shards_of(prefix)
    if saved and not found:
        return _why_not_joined(str(prefix), saved)
    progress = StoreFiles.of(prefix, "float32").progress
    if progress.exists():
        state = read_json(progress)
        rows, of = state.get("rows_done", 0), state.get("signature", {}).get("rows") or "?"
        return f"datastore {str(prefix)!r} is not complete ({rows} of {of} rows); resume with the same command"
    if found and not found[0].values.exists():
        return (
            f"datastore {str(prefix)!r} is not complete: {found[0].keys} exists, {found[0].values} does not; copy it "
            "too, or save the store again"
        )
    if found or OtherFiles.find(prefix, "float32").present():
        names = str(found[0].keys if found else OtherFiles.find(prefix, "float32").keys)
        return (
            f"{names} has no metadata ({prefix}.json) and its type or size is not as stated; files of the "
            "original programs need their --dstore-size (build_dstore.py: --dimension too), and --dstore-fp16 if they "
            "hold float16; fairseq-datastore convert makes them a store that needs none"
        )
    return (
        f"no datastore at {str(prefix)!r}: neither {prefix}.json nor {prefix}_keys.npy exists; eval_lm.py "
        "--save-knnlm-dstore saves one"
    )


def _why_not_joined(prefix: str, saved: Mapping[int, set[int]]) -> str:
    """What to tell about a store of which parts are there."""
    count = max(saved, key=lambda count: len(saved[count]))
    missing = sorted(set(range(count)) - saved[count])
    if not missing:
        return f"datastore {prefix!r} lies in {count} parts: join them with fairseq-datastore merge {prefix}"
    return (
        f"datastore {prefix!r} is not complete: of its {count} parts {', '.join(map(str, missing))} are not saved; the "
        "same command with the --shard-id of each saves them"
    )


def _no_keys(rows: int, dim: int, dtype: str) -> ChunkedArray:
    """Stands for keys that must not be read; takes no memory."""
    return ChunkedArray([np.broadcast_to(np.zeros(dim, KEY_DTYPES[dtype]), (rows, dim))], dtype)

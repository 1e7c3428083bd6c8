"""A datastore on disk: one key and one value (the token that came next) per position, and a JSON file that says what.

The arrays are headerless and row-major, as kNN-LM and TRIME write them: ``<prefix>_keys.npy`` (float32) or
``<prefix>-fp16_keys.npy`` (float16), and ``<prefix>_vals.npy`` (int64). ``<prefix>.json`` holds the rows, the width,
the types, where the keys come from and a checksum per block. ``datastore_writer.py`` writes them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.memory.datastore_writer import DatastoreWriter
from fairseq.memory.files import FORMAT_VERSION, KEY_DTYPES, Array, StoreFiles, file_checksums, read_json
from fairseq.memory.rows import Rows, as_tensor

logger = logging.getLogger(__name__)

__all__ = ["Datastore", "DatastoreWriter", "Rows", "as_tensor"]

_VALUE_DTYPES = ("int64", "int32", "int16")


@dataclass(frozen=True)
class Datastore:
    """An opened store. Its arrays stay on disk and are read as they are used, unless ``in_memory`` was called."""

    prefix: str
    keys: Rows
    """float32 or float16, (rows, dim)."""
    values: Rows
    """int64, int32 or int16, (rows,)."""
    metadata: Mapping[str, Any]
    """What ``<prefix>.json`` says; empty for headerless files."""
    has_keys: bool = True
    """Whether the keys can be read; a store whose scores come from the index does without, on disk too."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dim(self) -> int:
        """Width of the keys."""
        return self.keys.shape[1]

    @property
    def digest(self) -> str | None:
        """What tells this content from another's: a digest of the checksums; None for headerless files."""
        sums = self.metadata.get("checksums")
        return hashlib.sha256(repr(sums).encode()).hexdigest() if sums else None

    @classmethod
    def open(cls, prefix: str | Path, *, fp16: bool = False, with_keys: bool = True) -> Datastore:
        """Open a store that describes itself.

        Args:
            fp16: the caller expects float16 keys; without it the metadata decide.
            with_keys: False never touches the keys, which may then be missing.
        Raises: ValueError when the store is missing, incomplete, empty, damaged or of the other key type.
        """
        names = StoreFiles.of(prefix, "float32")
        if not names.metadata.exists():
            raise ValueError(_why_not_there(prefix))
        about = read_json(names.metadata)
        if about.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{names.metadata}: format version {about.get('format_version')!r}; this release reads {FORMAT_VERSION}"
            )
        try:
            rows, dim, dtype, value_dtype = (about[name] for name in ("rows", "dim", "key_dtype", "value_dtype"))
            complete = about["complete"]
        except KeyError as error:
            raise ValueError(
                f"{names.metadata} lacks {error}; it is damaged or not a datastore's: save it again"
            ) from None
        if dtype not in KEY_DTYPES or value_dtype not in _VALUE_DTYPES:
            known = f"{', '.join(KEY_DTYPES)} and {', '.join(_VALUE_DTYPES)}"
            raise ValueError(f"{names.metadata}: keys of type {dtype!r}, values of {value_dtype!r}; known: {known}")
        if not (isinstance(rows, int) and isinstance(dim, int) and dim > 0):
            raise ValueError(f"{names.metadata}: {rows!r} rows of width {dim!r}; it is damaged: save it again")
        if fp16 and dtype != "float16":
            raise ValueError(f"datastore {str(prefix)!r} holds {dtype} keys and --dstore-fp16 was given; leave it out")
        if not complete:
            raise ValueError(f"datastore {str(prefix)!r} is not complete; resume with the command that saves it")
        names = StoreFiles.of(prefix, dtype)
        values = _mapped(names.values, (rows,), value_dtype)
        keys = _mapped(names.keys, (rows, dim), dtype) if with_keys else _no_keys(rows, dim, dtype)
        return cls(str(prefix), Rows.of(keys), Rows.of(values), about, with_keys)

    @classmethod
    def open_headerless(
        cls, prefix: str | Path, *, dim: int, size: int | None = None, fp16: bool = False, with_keys: bool = True
    ) -> Datastore:
        """Open files of the original programs, which do not say what they hold; byte counts are checked first.

        Args:
            dim: width of the keys.
            size: rows; by default what the byte counts make.
            fp16: the keys are float16: TRIME's names and int64 values, or kNN-LM's names and int16 values.
            with_keys: False never touches the keys, which may then be missing; ``size`` must be given.
        Raises: ValueError when the files are missing or the byte counts do not fit.
        """
        dtype = "float16" if fp16 else "float32"
        names = StoreFiles.of(prefix, dtype)
        if not with_keys:
            if not names.values.exists() or size is None:
                raise ValueError(_why_not_there(prefix))
            values = _mapped(names.values, (size,), _value_dtype(names.values, size))
            return cls(str(prefix), Rows.of(_no_keys(size, dim, dtype)), Rows.of(values), {}, False)
        if fp16 and not names.keys.exists():
            names = StoreFiles.of(prefix, "float32")  # kNN-LM uses one name for both types
        for path in (names.keys, names.values):
            if not path.exists():
                raise ValueError(_why_not_there(prefix))
        rows = _rows_of(names, dim, size, dtype)
        value_dtype = _value_dtype(names.values, rows)
        keys = _mapped(names.keys, (rows, dim), dtype)
        if not keys[-1].any():
            logger.warning(
                "the last key of %s is all zeros: the program that wrote it may have stopped early, or --dstore-size "
                "was larger than the split; verify before you trust figures",
                names.keys,
            )
        return cls(str(prefix), Rows.of(keys), Rows.of(_mapped(names.values, (rows,), value_dtype)), {})

    def require(
        self,
        *,
        dim: int | None = None,
        size: int | None = None,
        key_tap: str | None = None,
        dictionary_digest: str | None = None,
        dictionary_size: int | None = None,
    ) -> Datastore:
        """Check that the store fits its user; what the files do not tell is not compared. Returns the store itself.

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

    def take_keys(self, ids_N: Array) -> Array:
        """Keys of some rows as float32, (N, dim), read in the order of the file and each row once."""
        return np.asarray(self.keys.take(ids_N).numpy())

    def in_memory(self) -> Datastore:
        """The same store with its arrays read into memory."""
        keys = self.keys.in_memory() if self.has_keys else self.keys
        return Datastore(self.prefix, keys, self.values.in_memory(), self.metadata, self.has_keys)

    def verify(self) -> None:
        """Compare every block with its checksum. Raises: ValueError naming the file and the bytes that differ."""
        names = StoreFiles.of(self.prefix, self.keys.dtype)
        for part, path in (("keys", names.keys), ("values", names.values)):
            saved = self.metadata.get("checksums", {}).get(part)
            if saved is None:
                raise ValueError(f"datastore {self.prefix!r} has no checksums; headerless files cannot be verified")
            for number, (before, now) in enumerate(zip(saved, file_checksums(path))):
                if before != now:
                    first = number * self.metadata["block_bytes"]
                    raise ValueError(f"{path}: the block from byte {first} on differs from what was saved")


def _why_not_there(prefix: str | Path) -> str:
    """What to tell about a store that cannot be opened by its metadata."""
    found = [names for names in (StoreFiles.of(prefix, dtype) for dtype in KEY_DTYPES) if names.keys.exists()]
    progress = StoreFiles.of(prefix, "float32").progress
    if progress.exists():
        state = read_json(progress)
        rows, of = state.get("rows_done", 0), state.get("signature", {}).get("rows", "?")
        return f"datastore {str(prefix)!r} is not complete ({rows} of {of} rows); resume with the same command"
    if found and not found[0].values.exists():
        return (
            f"datastore {str(prefix)!r} is not complete: {found[0].keys} exists, {found[0].values} does not; copy it "
            "too, or save the store again"
        )
    if found:
        return (
            f"{found[0].keys} has no metadata ({prefix}.json) and its type or size is not as stated; files of the "
            "original programs need their --dstore-size (build_dstore.py: --dimension too), and --dstore-fp16 if they "
            "hold float16"
        )
    return (
        f"no datastore at {str(prefix)!r}: neither {prefix}.json nor {prefix}_keys.npy exists; eval_lm.py "
        "--save-knnlm-dstore saves one"
    )


def _rows_of(names: StoreFiles, dim: int, size: int | None, dtype: str) -> int:
    """Rows of headerless keys. Raises: ValueError with both byte counts."""
    row_bytes = dim * np.dtype(dtype).itemsize
    held = names.keys.stat().st_size
    rows = held // row_bytes if size is None else size
    if rows < 1:
        raise ValueError(f"{names.keys} holds {held} bytes: no row of {dim} {dtype} values; the store is empty")
    if held == rows * row_bytes:
        return rows
    hint = "check the size and the width"
    if held == rows * dim * 2 and dtype == "float32":
        hint = "these are float16 keys: add --dstore-fp16"
    elif held == rows * dim * 4:
        hint = "these are float32 keys: leave out --dstore-fp16"
    elif held % row_bytes == 0:
        hint = f"at this width it holds {held // row_bytes} rows"
    raise ValueError(
        f"{names.keys} holds {held} bytes; {rows} rows of {dim} {dtype} values take {rows * row_bytes}: {hint}"
    )


def _value_dtype(path: Path, rows: int) -> str:
    """The integer type of headerless values, by their byte count."""
    held = path.stat().st_size
    for dtype in _VALUE_DTYPES:
        if held == rows * np.dtype(dtype).itemsize:
            return dtype
    raise ValueError(
        f"{path} holds {held} bytes; {rows} values take {rows * 8} as int64, {rows * 4} as int32 or {rows * 2} as int16"
    )


def _no_keys(rows: int, dim: int, dtype: str) -> Array:
    """Stands for keys that must not be read; takes no memory."""
    return np.broadcast_to(np.zeros(dim, dtype), (rows, dim))


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Map a headerless array. Raises: ValueError when the file is missing, empty or of another size."""
    if shape[0] < 1:
        raise ValueError(f"{path}: the datastore has no rows; save one with at least one scored token")
    if not path.exists():
        raise ValueError(f"{path} does not exist, though the metadata beside it name it; save the store again")
    held, needed = path.stat().st_size, int(np.prod(shape)) * np.dtype(dtype).itemsize
    if held != needed:
        raise ValueError(
            f"{path} holds {held} bytes; {shape[0]} rows of {dtype} take {needed}: it is truncated or of another "
            "store; copy it again, or save the store again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)

"""Datastores of other programs, which have no metadata: their names, and checks of their byte counts.

| program | keys | values |
|---|---|---|
| kNN-LM | ``<prefix>_keys.npy``, float32 or float16 | ``<prefix>_vals.npy``, int64, with float16 keys int16 |
| TRIME | ``<prefix>_keys.npy`` float32, ``<prefix>-fp16_keys.npy`` float16 | ``<prefix>_vals.npy``, int64 |
| kNN-MT | ``<folder>/keys.npy``, float32 or float16 | ``<folder>/vals.npy``, int64 or int32 |
| knn-box | as kNN-MT's, with their sizes in ``config.json`` | the same |
| Sockeye | as kNN-MT's, with their sizes in ``config.yaml`` | ``<folder>/vals.npy``, int32 |
| knn-models | as kNN-MT's | ``<folder>/values.npy``, int64 |
| knn-transformers | ``<folder>/dstore_<model>_<rows>_<width>_keys.npy``, float16 | the same with ``_vals.npy``, int32 |

knn-seq keeps both in HDF5 files, which are named and not read.

The arrays have no header, despite their names; files with NumPy's header are read accordingly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq.memory.datastore.layout import KEY_DTYPES, VALUE_DTYPES, StoreFiles
from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_array
from fairseq.runtime.files import read_json

_SIZES_IN_NAME = re.compile(r"dstore_.+_(\d+)_(\d+)")
_MAGIC = b"\x93NUMPY"
_HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class ForeignFiles:
    """Two files that may be a store, and the sizes in their names."""

    keys: Path
    values: Path
    rows: int | None = None
    dim: int | None = None

    @classmethod
    def find(cls, prefix: str | Path, dtype: str) -> ForeignFiles:
        """The files of a PREFIX (or folder). Raises: ValueError when a folder holds several stores."""
        names = StoreFiles.of(prefix, dtype)
        if dtype == "float16" and not names.keys.exists():
            names = StoreFiles.of(prefix, "float32")  # kNN-LM uses one name for both types
        if Path(prefix).is_dir() and (names.keys.parent == Path(prefix) or not names.keys.exists()):
            return cls._in_folder(Path(prefix))
        match = _SIZES_IN_NAME.fullmatch(Path(prefix).name)
        return cls(names.keys, names.values, *(map(int, match.groups()) if match else ()))

    @classmethod
    def _in_folder(cls, folder: Path) -> ForeignFiles:
        stores = sorted(path for path in folder.glob("dstore_*_keys.npy"))
        if len(stores) > 1:
            names = ", ".join(path.name.removesuffix("_keys.npy") for path in stores)
            raise ValueError(f"{str(folder)!r} holds several stores: {names}; give one of them, with its folder")
        if stores:
            return cls.find(folder / stores[0].name.removesuffix("_keys.npy"), "float32")
        values = next((folder / name for name in ("vals.npy", "values.npy") if (folder / name).exists()), None)
        return cls(folder / "keys.npy", values or folder / "vals.npy", *(_stated_sizes(folder) or ()))

    @property
    def state_their_sizes(self) -> bool:
        """True if the files state their rows and width."""
        return self.rows is not None or (_has_header(self.keys) and _has_header(self.values))

    def present(self) -> bool:
        """True if both files exist."""
        return self.keys.exists() and self.values.exists()


def _stated_sizes(folder: Path) -> tuple[int, int] | None:
    """Rows and width by the settings that knn-box or Sockeye keeps beside its arrays; None without them.

    Raises: ValueError for knn-box's settings without them.
    """
    if (folder / "config.json").exists():
        arrays = read_json(folder / "config.json").get("data_infos")
        if arrays is None:
            return None
        try:
            rows, dim = map(int, arrays["keys"]["shape"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} does not state the shape of the keys; copy it again") from error
        return rows, dim
    if (folder / "config.yaml").exists():
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        found = [re.search(rf"^{name}: (\d+)$", text, re.MULTILINE) for name in ("index_size", "dimension")]
        if found[0] and found[1]:
            return int(found[0][1]), int(found[1][1])
    return None


def in_hdf5(folder: Path) -> bool:
    """True for knn-seq's folder, whose arrays are not read."""
    path = folder / "values.bin"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_HDF5)) == _HDF5


def map_keys(files: ForeignFiles, dim: int | None, size: int | None, dtype: str) -> tuple[Array, str]:
    """Map the keys; returns them and their type. Raises: ValueError when their shape differs from the stated one."""
    if _has_header(files.keys):
        keys = _by_header(files.keys, 2)
        rows, width, kind = *keys.shape, str(keys.dtype)
        if kind not in ("float32", "float16"):
            raise ValueError(f"{files.keys} holds {kind}, keys are float32 or float16; save it again as one of them")
    else:
        rows, width, kind = _sizes(files, dim, size, dtype)
        keys = map_array(files.keys, (rows, width), kind)
    for unit, held, stated in (("rows", rows, size), ("columns", width, dim)):
        if stated is not None and stated != held:
            raise ValueError(f"{files.keys} holds {held} {unit}, {stated} were stated; drop the stated size")
    return keys, kind


def map_values(path: Path, rows: int) -> Array:
    """Map the values, of any integer type. Raises: ValueError with both numbers when their count differs."""
    if _has_header(path):
        values = _by_header(path, None).reshape(-1)
        if len(values) != rows or str(values.dtype) not in VALUE_DTYPES:
            raise ValueError(
                f"{path} holds {len(values)} {values.dtype}, the keys are {rows} rows; give files of one store"
            )
        return values
    held = path.stat().st_size
    for dtype in VALUE_DTYPES:
        if held == rows * np.dtype(dtype).itemsize:
            return map_array(path, (rows,), dtype)
    raise ValueError(
        f"{path} holds {held} bytes; {rows} values take {rows * 8} as int64, {rows * 4} as int32 or "
        f"{rows * 2} as int16; check the size and the width"
    )


def map_array(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Map a headerless array of a named type. Raises: ValueError when the file is missing, empty or of another size."""
    if shape[0] < 1:
        raise ValueError(f"{path}: the datastore has no rows; save one with at least one scored token")
    if not path.exists():
        raise ValueError(f"{path} does not exist, though the metadata list it; save the store again")
    on_disk = KEY_DTYPES.get(dtype) or np.dtype(dtype)
    held, needed = path.stat().st_size, math.prod(shape) * on_disk.itemsize
    if held != needed:
        raise ValueError(
            f"{path} holds {held} bytes; {shape[0]} rows of {dtype} take {needed}: it is truncated or of another "
            "store; copy it again, or save the store again"
        )
    return np.memmap(path, dtype=on_disk, mode="r", shape=shape)


def _sizes(files: ForeignFiles, dim: int | None, size: int | None, dtype: str) -> tuple[int, int, str]:
    """Rows, width and type of headerless keys. Raises: ValueError with both byte counts."""
    held = files.keys.stat().st_size
    if files.rows is not None and files.dim is not None:
        numbers = files.rows * files.dim
        for kind in ("float16", "float32"):
            if held == numbers * KEY_DTYPES[kind].itemsize:
                return files.rows, files.dim, kind
        raise ValueError(
            f"{files.keys} holds {held} bytes; by its name or settings it has {files.rows} rows of {files.dim} "
            f"values, which take {numbers * 2} as float16 or {numbers * 4} as float32: it is truncated or renamed; "
            "copy it again"
        )
    if dim is None:
        raise ValueError(f"{files.keys} does not state the width of its rows; give --dimension")
    row_bytes = dim * KEY_DTYPES[dtype].itemsize
    rows = held // row_bytes if size is None else size
    if rows < 1:
        raise ValueError(
            f"{files.keys} holds {held} bytes, no row of {dim} {dtype} values: the store is empty; save it again"
        )
    if held == rows * row_bytes:
        return rows, dim, dtype
    hint = "check the size and the width"
    if held == rows * dim * 2 and dtype == "float32":
        hint = "these are float16 keys: add --dstore-fp16"
    elif held == rows * dim * 4:
        hint = "these are float32 keys: drop --dstore-fp16"
    elif held % row_bytes == 0:
        hint = f"at this width it holds {held // row_bytes} rows: check the size"
    raise ValueError(
        f"{files.keys} holds {held} bytes; {rows} rows of {dim} {dtype} values take {rows * row_bytes}; {hint}"
    )


def _has_header(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _by_header(path: Path, ndim: int | None) -> Array:
    """Map an array that NumPy saved. Raises: ValueError when it is cut short or has another shape."""
    array: Array = read_array(path, "is not a complete NumPy array", "copy it again", mapped=True)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{path} holds an array of shape {array.shape}, keys are (rows, width); save it in that shape")
    if not array.size or not array.flags.c_contiguous:
        raise ValueError(f"{path} holds {array.shape}, empty or in column order; save it in row order")
    return array

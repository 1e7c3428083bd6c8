"""The header of a safetensors file, read and compared with the file's size before any array is mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.runtime.files import DAMAGED, BlockChecksums, parse_json
from fairseq.runtime.records import TEXT, WHOLE, Entries, Fields, Items, one_of, require

ITEM_BYTES: Mapping[str, int] = {
    **{name: 8 for name in ("F64", "I64", "U64")},
    **{name: 4 for name in ("F32", "I32", "U32")},
    **{name: 2 for name in ("F16", "BF16", "I16", "U16")},
    **{name: 1 for name in ("I8", "U8", "BOOL")},
}
"""Bytes of a number by its type's name in safetensors."""

_LONGEST_HEADER = 100 << 20  # as safetensors has it
_ARRAY = Fields({"dtype": one_of(*ITEM_BYTES), "shape": Items(WHOLE), "data_offsets": Items(WHOLE)})


@dataclass(frozen=True)
class TensorEntry:
    """An array of a file."""

    dtype: str
    """Its type, as safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """What the header says."""

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of an array, mapped."""
        entry = self.entries[name]
        if not entry.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", entry.start, (entry.nbytes,))

    def damaged(self, checksums: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Names of the arrays whose blocks differ from these checksums."""
        for name, saved in checksums.items():
            if block_sums(self.bytes_of(name)) != list(saved):
                yield name


def block_sums(data: npt.NDArray[np.uint8]) -> list[str]:
    """The checksums of bytes in memory, or mapped, block by block."""
    sums = BlockChecksums()
    sums.update(data.data)
    return sums.digests()


def is_tensor_file(path: Path) -> bool:
    """True if a file begins as safetensors files do: the length of a header, and a brace."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < _LONGEST_HEADER


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes them in another one in each process."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same words in another order are not longer"
        file.seek(8)
        file.write(text.ljust(length))


def read_tensor_file(path: Path, what: str, fix: str = DAMAGED) -> TensorFile:
    """Read the header.

    Args:
        what: what the file should be, for the message: "memory".
        fix: the way out, an imperative clause.
    Raises: ValueError naming the file when it is cut short, damaged or something else; OSError when it cannot be read.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes")
            header: Any = parse_json(file.read(length), "the header", "")
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        require(metadata, Entries(TEXT), "its metadata", "")
        require(header, Entries(_ARRAY), "its header", "")
    except ValueError as error:
        reason = str(error).rstrip("; ")
        raise ValueError(f"{path} is no {what}: another kind of file, or damaged ({reason}); {fix}") from None
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        nbytes = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        if entry["data_offsets"] != [end, end + nbytes]:
            raise ValueError(f"{path} is damaged: type, shape and place of its array {name!r} do not fit; {fix}")
        entries[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), 8 + length + end, nbytes)
        end += nbytes
    if size != 8 + length + end:
        raise ValueError(f"{path} holds {size} bytes, its header says {8 + length + end}: it is truncated; {fix}")
    return TensorFile(path, metadata, entries)

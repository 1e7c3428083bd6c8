"""Sentences as token numbers in one memory-mapped file, byte-compatible with fairseq's ``mmap`` data sets.

``X.bin`` holds the concatenated numbers of all sentences. ``X.idx`` holds, little-endian: the magic
``MMIDIDX\\0\\0``, version (uint64), number type (uint8 code), number of sentences (uint64), their sizes (int32 each)
and their byte offsets in ``X.bin`` (int64 each).

The layout before it (``--dataset-impl lazy`` and ``cached``) is read too. Its ``X.bin`` holds each number plus one; its
``X.idx`` holds the magic ``TNTIDX\\0\\0``, version, number type, bytes per number, number of sentences S and of sizes
(uint64 each), offsets into the sizes (S + 1), offsets into ``X.bin`` in numbers (S + 1), and the sizes (int64 each).
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.runtime.atomic_files import naming, replacing
from fairseq.runtime.file_marks import MARK, differs, mark_of
from fairseq.runtime.files import BlockChecksums, read_json, write_json
from fairseq.runtime.records import Entries, Fields, is_sealed, one_of, read_record, seal

logger = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQ")
_OLD_MAGIC = b"TNTIDX\x00\x00"
_OLD_HEADER = struct.Struct("<8sQQQQQ")
# Layouts that are not read: first bytes of the index -> the name of --dataset-impl.
_OTHER_LAYOUTS = {b"HUFFIDX\x00\x00": "huffman", b">": "fasta"}
# Codes 6 and 7 are floating point: legal in the format, but no token numbers.
_FLOAT_CODES = (6, 7)
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}
SUMS_ENDING = ".sums.json"
_SUMS_FORMAT = "fairseq-memory checksums"
_SUMS = Fields({"format": one_of(_SUMS_FORMAT), "version": one_of(1), "files": Entries(MARK)})
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}

IntArray = npt.NDArray[np.integer[Any]]


def best_fitting_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The number type in which fairseq stores a vocabulary of this size."""
    return np.uint16 if vocab_size < 65500 else np.int32


class MMapIndexedDataset:
    """The sentences of ``prefix.bin`` and ``prefix.idx``."""

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Map the files. Raises: ValueError when one is missing, truncated or not a data set."""
        self.prefix = os.fspath(prefix)
        is_old, dtype, self.sizes = _read_index(self.prefix + ".idx")
        tokens = _map_tokens(self.prefix + ".bin", dtype, int(self.sizes.sum(dtype=np.int64)))
        self.tokens: IntArray = _from_old_numbers(tokens, self.prefix + ".bin") if is_old else tokens
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        require_undamaged(self.prefix, whole=False)  # last: the checks before it say more precisely what is wrong

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """The tokens of sentence ``i``."""
        if not 0 <= i < len(self.sizes):
            raise IndexError(f"sentence {i} of {len(self.sizes)}")
        end = int(self._ends[i])
        return self.tokens[end - int(self.sizes[i]) : end].astype(np.int64)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return (self[i] for i in range(len(self)))


def require_undamaged(prefix: str, *, whole: bool) -> bool:
    """Compare a data set with its checksums; False where there are none (files of fairseq or an earlier release).

    Args:
        whole: compare every block; otherwise those of files of at most 64 MiB, unless a size says that another program
            wrote the files since: then one line is logged.
    Raises: ValueError naming the file that differs.
    """
    sums = Path(prefix + SUMS_ENDING)
    if not sums.is_file():
        return False
    way_out = f"copy it again, or run preprocess.py again; if another program wrote it, remove {sums}"
    if is_sealed(read_json(sums, way_out)) is False:
        raise ValueError(f"{sums} is damaged: it differs from its own checksum; {way_out}")
    marks = read_record(sums, _SUMS, way_out)["files"]
    sizes = {ending: Path(prefix + ending).stat().st_size for ending in marks if Path(prefix + ending).exists()}
    if not whole and any(size != marks[ending]["bytes"] for ending, size in sizes.items()):
        # Both files fit each other (checked before), so they are whole and of another data set.
        logger.warning("%s is of another data set than %s.bin, and is passed over; remove it", sums, prefix)
        return False
    for ending, mark in marks.items():
        path = Path(prefix + ending)
        difference = differs(path, mark, whole=whole) if path.exists() else None  # a missing one is reported later
        if difference is not None:
            raise ValueError(f"{path} is damaged or of another data set ({difference}); {way_out}")
    return True


def _read_index(path: str) -> tuple[bool, np.dtype[Any], npt.NDArray[np.int32]]:
    """True for the layout before mmap, the type of the numbers, and the sentences' sizes."""
    if not os.path.exists(path):
        raise ValueError(f"no such data set: {path} is missing; run preprocess.py")
    with open(path, "rb") as file:
        header = file.read(_OLD_HEADER.size)
    if header.startswith(_OLD_MAGIC):
        return True, *_read_old_index(path, header)
    for magic, name in _OTHER_LAYOUTS.items():
        if header.startswith(magic):
            raise ValueError(
                f"{path} is of fairseq's --dataset-impl {name}, which is not read here; binarise the text again "
                "with preprocess.py"
            )
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a fairseq mmap index (bad magic); run preprocess.py again")
    header = header[: _HEADER.size]
    _, version, code, count = _HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, expected {VERSION}; run preprocess.py again")
    _require_integers(path, code)
    actual, expected = os.path.getsize(path), _HEADER.size + 12 * count
    if actual != expected:
        raise ValueError(
            f"{path} has {actual} bytes, {count} sentences need {expected}; it is truncated or damaged: "
            "run preprocess.py again"
        )
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    sizes = raw[_HEADER.size : _HEADER.size + 4 * count].view("<i4")
    pointers = raw[_HEADER.size + 4 * count :].view("<i8")
    dtype = np.dtype(_DTYPES[code])
    ends = np.cumsum(sizes, dtype=np.int64) * dtype.itemsize
    if count and (pointers[0] != 0 or sizes.min() < 0 or not np.array_equal(pointers[1:], ends[:-1])):
        raise ValueError(f"{path}: sizes and offsets do not match; it is damaged: run preprocess.py again")
    return False, dtype.newbyteorder("<"), np.array(sizes, dtype=np.int32)


def _require_integers(path: str, code: int) -> None:
    if code in _FLOAT_CODES:
        raise ValueError(f"{path} has number type {code}, floating point: features, not tokens; give binarised text")
    if code not in _DTYPES:
        raise ValueError(f"{path} has number type {code}, expected one of {sorted(_DTYPES)}; run preprocess.py again")


def _read_old_index(path: str, header: bytes) -> tuple[np.dtype[Any], npt.NDArray[np.int32]]:
    """Number type and sizes of an index in the layout before mmap; each sentence has one size, its tokens."""
    again = "run preprocess.py again"
    if len(header) < _OLD_HEADER.size:
        raise ValueError(f"{path} has {len(header)} bytes, its header alone has {_OLD_HEADER.size}; {again}")
    _, version, code, item_bytes, count, num_sizes = _OLD_HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}, expected {VERSION}; {again}")
    _require_integers(path, code)
    dtype = np.dtype(_DTYPES[code])
    if item_bytes != dtype.itemsize or num_sizes != count:
        raise ValueError(
            f"{path}: {num_sizes} sizes of {count} sentences, {item_bytes} bytes per {dtype}: this is no text; {again}"
        )
    actual, expected = os.path.getsize(path), _OLD_HEADER.size + 8 * (3 * count + 2)
    if actual != expected:
        raise ValueError(
            f"{path} has {actual} bytes, {count} sentences need {expected}; it is truncated or damaged: {again}"
        )
    numbers = np.fromfile(path, "<i8", offset=_OLD_HEADER.size)
    offsets, sizes = numbers[count + 1 : 2 * count + 2], numbers[2 * count + 2 :]
    if sizes.min(initial=0) < 0 or offsets[0] != 0 or not np.array_equal(offsets[1:], np.cumsum(sizes)):
        raise ValueError(f"{path}: sizes and offsets do not match; it is damaged: {again}")
    return dtype.newbyteorder("<"), sizes.astype(np.int32)


def _from_old_numbers(stored: IntArray, path: str) -> IntArray:
    """Token numbers of the layout before mmap, which counts them from 1. Raises: ValueError for a number of 0."""
    if len(stored) and int(stored.min()) < 1:
        raise ValueError(f"{path} holds the number 0, but its layout counts from 1; run preprocess.py again")
    logger.info("%s has the layout before mmap and is read whole; preprocess.py writes one that is mapped", path)
    tokens: IntArray = stored - stored.dtype.type(1)
    return tokens


def _map_tokens(path: str, dtype: np.dtype[Any], count: int) -> IntArray:
    if not os.path.exists(path):
        raise ValueError(f"no such data set: {path} is missing; run preprocess.py")
    actual, expected = os.path.getsize(path), count * dtype.itemsize
    if actual != expected:
        raise ValueError(
            f"{path} has {actual} bytes, its .idx says {count} tokens of {dtype.itemsize} bytes ({expected}); "
            "it is truncated or belongs to another index: run preprocess.py again"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


class MMapIndexedDatasetBuilder:
    """Writer of a data set, sentence by sentence; :meth:`finalize` gives the files their names."""

    def __init__(self, bin_path: str | os.PathLike[str], dtype: npt.DTypeLike = np.int64) -> None:
        self.bin_path = os.fspath(bin_path)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(
                f"{self.dtype} is not among the number types {sorted(map(str, _CODES))}; choose one of them"
            )
        self._file = open(self.bin_path + ".tmp", "wb")  # noqa: SIM115  closed by finalize or __exit__
        self._sizes: list[npt.NDArray[np.int32]] = []
        self._sums, self._bytes = BlockChecksums(), 0

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one sentence."""
        flat = np.asarray(tokens)
        self.add_items(flat, np.array([len(flat)]))

    def add_items(self, tokens: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        """Append several sentences, given as their concatenated tokens and their sizes.

        Raises: ValueError for a token that the number type cannot hold.
        """
        values, lengths = np.asarray(tokens), np.asarray(sizes, dtype=np.int32)
        assert len(values) == lengths.sum(dtype=np.int64), (len(values), lengths.sum())
        stored = values.astype(self.dtype)
        if values.dtype != self.dtype and not np.array_equal(stored, values):
            raise ValueError(
                f"{self.bin_path}: tokens {values.min()}..{values.max()} do not fit {self.dtype}; choose a wider type"
            )
        data = stored.tobytes()
        with naming(self.bin_path):
            self._file.write(data)
        self._sums.update(memoryview(data))
        self._bytes += len(data)
        self._sizes.append(lengths)

    def merge_file_(self, prefix: str | os.PathLike[str]) -> None:
        """Append all sentences of another data set."""
        other = MMapIndexedDataset(prefix)
        self.add_items(other.tokens, other.sizes)

    def finalize(self, idx_path: str | os.PathLike[str]) -> None:
        """Write the index and give both files their names."""
        sizes = np.concatenate([np.empty(0, np.int32), *self._sizes]).astype("<i4")
        pointers = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        idx_path = os.fspath(idx_path)
        index = b"".join(
            [_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(sizes)), sizes.tobytes(), pointers.tobytes()]
        )
        sums_path = Path(os.path.splitext(self.bin_path)[0] + SUMS_ENDING)
        with replacing(idx_path) as aside:
            with open(aside, "wb") as file:
                file.write(index)
            with naming(self.bin_path):
                self._file.close()
            sums_path.unlink(missing_ok=True)  # before the files it describes change
            os.replace(self.bin_path + ".tmp", self.bin_path)
        index_sums = BlockChecksums()
        index_sums.update(memoryview(index))
        if os.path.splitext(idx_path)[0] == os.path.splitext(self.bin_path)[0]:
            marks = {".bin": mark_of(self._bytes, self._sums.digests())}
            marks[".idx"] = mark_of(len(index), index_sums.digests())
            write_json(sums_path, seal({"format": _SUMS_FORMAT, "version": VERSION, "files": marks}))

    def __enter__(self) -> MMapIndexedDatasetBuilder:
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the unfinished file unless it was finalised."""
        with contextlib.suppress(OSError):  # a failed write was already reported by add_items
            self._file.close()
        if os.path.exists(self.bin_path + ".tmp"):
            os.remove(self.bin_path + ".tmp")

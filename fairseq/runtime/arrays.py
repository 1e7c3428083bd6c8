"""Arrays that NumPy saved, read so that a damaged or made-up file ends in one line that names it.

``numpy.load`` believes a header: a shape of 10**12 rows is allocated before a byte is read, a zip archive is opened
where an array was expected, and damage ends in a dozen kinds of exceptions. Here a shape has to fit the bytes first.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fairseq.runtime.files import DAMAGED

AnyArray = npt.NDArray[Any]
_CHUNK_BYTES = 4 << 20
_LONGEST_HEADER = 10_000  # what numpy reads without being asked to


def read_array(path: str | os.PathLike[str], what: str, fix: str = DAMAGED, *, mapped: bool = False) -> AnyArray:
    """Read, or map, a ``.npy`` file of numbers.

    Args:
        what: what a message says of another file: "is not a list of rows".
        fix: the way out, an imperative clause.
        mapped: leave it on disk; it is read as it is used.
    Raises: ValueError naming the file when it is damaged or something else; OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            shape, by_column, dtype = _header(file)
            held = os.fstat(file.fileno()).st_size - file.tell()
            _require_size(shape, dtype, held)
            if mapped and held:
                return np.memmap(path, dtype, "r", file.tell(), shape, "F" if by_column else "C")
            return _content(file, held, shape, dtype, by_column)
        except OSError:
            raise
        except Exception as error:  # numpy parses the header as Python text, which can fail in any way
            raise ValueError(_message(path, what, error, fix)) from None


def read_arrays(path: str | os.PathLike[str], what: str, fix: str = DAMAGED) -> dict[str, AnyArray]:
    """Read all arrays of a ``.npz`` file; the archive's CRC-32 of each is compared.

    Args:
        what: what a message says of another file: "is no file of clusters".
        fix: the way out, an imperative clause.
    Raises: ValueError naming the file when it is damaged or something else; OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {entry.filename.removesuffix(".npy"): _member(archive, entry) for entry in archive.infolist()}
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile and zlib raise eight kinds
            raise ValueError(_message(path, what, error, fix)) from None


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> AnyArray:
    if entry.compress_type != zipfile.ZIP_STORED:  # a few bytes of a compressed one may stand for gigabytes
        raise ValueError(f"{entry.filename} is compressed")
    with archive.open(entry) as file:
        shape, by_column, dtype = _header(file)
        held = entry.file_size - file.tell()
        _require_size(shape, dtype, held)
        return _content(file, held, shape, dtype, by_column)


def _content(file: IO[bytes], length: int, shape: tuple[int, ...], dtype: np.dtype[Any], by_column: bool) -> AnyArray:
    """The rest of a file, read to its end: only there zipfile compares the checksum."""
    data, at = np.empty(length, np.uint8), 0
    while chunk := file.read(_CHUNK_BYTES):
        data[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    if at != length:
        raise ValueError(f"{at} bytes instead of {length}")
    array: AnyArray = data.view(dtype).reshape(shape, order="F" if by_column else "C")
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    return shape, by_column, dtype


def _require_size(shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed != held:
        raise ValueError(f"{held} bytes, {dtype} {shape} takes {needed}")


def _message(path: str | os.PathLike[str], what: str, error: Exception, fix: str) -> str:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{os.fspath(path)} {what}, or damaged ({reason}); {fix}"

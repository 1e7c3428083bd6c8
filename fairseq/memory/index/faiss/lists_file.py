"""The file that holds the lists of an index, found by the description that faiss keeps of it."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECORD = b"ilod"  # faiss begins the description of lists in another file by it


def check_lists_file(index: Path, metadata: Mapping[str, Any]) -> bool:
    """True if the lists of an index are in a file of their own.

    Such a file is mapped by itself: to map the index too (``IO_FLAG_MMAP``) ends the process in faiss 1.15, and so does
    a search in a file of lists that is cut short.

    Args:
        index: the index file.
        metadata: of the file beside it, empty without one; then the index is read to find the description of its lists.
    Raises: ValueError when the file of lists is missing or has another size than the index says.
    """
    described = metadata.get("files")
    if (described is not None and len(described) == 1) or not index.stat().st_size:
        return False
    with open(index, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _described_lists(data)
    if found is None:
        return False
    lists = index.with_name(os.path.basename(found[0]))
    if not lists.is_file():
        raise ValueError(f"{lists} is missing: it holds the lists of {index}; copy it too, or rebuild the index")
    if lists.stat().st_size != found[1]:
        raise ValueError(
            f"{lists} has {lists.stat().st_size} bytes, the lists of {index} {found[1]}; copy both files again, or "
            "rebuild the index"
        )
    return True


def _described_lists(data: mmap.mmap) -> tuple[str, int] | None:
    """Name and size of the file of lists that an index describes.

    After the record's name come, in 8 bytes each: lists, bytes of a code, and three arrays with their lengths: size,
    capacity and offset of each list, free places (offset, capacity), the name; at last the size of the file.
    """
    at = data.find(_RECORD)
    while at >= 0:
        try:
            place = at + len(_RECORD)
            num_lists, _, entries = struct.unpack_from("<3Q", data, place)
            place += 24 + 24 * entries
            (free,) = struct.unpack_from("<Q", data, place)
            place += 8 + 16 * free
            (length,) = struct.unpack_from("<Q", data, place)
            name = data[place + 8 : place + 8 + length]
            (size,) = struct.unpack_from("<Q", data, place + 8 + length)
            if num_lists == entries and 0 < length == len(name) < 1 << 16:
                return name.decode(), size
        except (struct.error, UnicodeDecodeError, OverflowError):
            pass  # four bytes of codes that happen to be the same
        at = data.find(_RECORD, at + 1)
    return None

"""Marks that detect an exchanged or damaged file: its size, a checksum of its ends, and one of each block."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq.runtime.files import BLOCK_BYTES, file_checksums
from fairseq.runtime.records import CRC, POSITIVE, WHOLE, Fields, Items

_END_BYTES = 1 << 20
COMPARED_WHOLE = 64 << 20
"""Files up to this size are compared whole when they are opened: 64 MiB take 40 to 60 ms of a command of seconds.
Longer ones by their ends; ``fairseq-datastore verify`` compares all of them whole."""

MARK = Fields({"bytes": WHOLE}, {"ends": CRC, "block_bytes": POSITIVE, "blocks": Items(CRC)})
"""Schema of a mark."""


def file_mark(path: Path) -> dict[str, Any]:
    """A mark that identifies a file: size, CRC-32 of its first and last MiB, and of each block of 4 MiB."""
    mark = {"bytes": path.stat().st_size, "ends": _ends(path), "block_bytes": BLOCK_BYTES}
    return mark | {"blocks": list(file_checksums(path, BLOCK_BYTES))}


def mark_of(size: int, blocks: Sequence[str]) -> dict[str, Any]:
    """A mark of a file whose checksums were taken while it was written."""
    return {"bytes": size, "block_bytes": BLOCK_BYTES, "blocks": list(blocks)}


def differs(path: Path, mark: Mapping[str, Any], *, whole: bool) -> str | None:
    """A clause that says how a file differs from its mark; None where it does not.

    Args:
        whole: compare every block; otherwise only those of a file of at most 64 MiB, and the ends of a longer one.
    """
    size = path.stat().st_size
    if size != mark["bytes"]:
        return f"{size} bytes, {mark['bytes']} when it was written"
    if "blocks" in mark and "block_bytes" in mark and (whole or size <= COMPARED_WHOLE):
        return next(_wrong_blocks(path, size, mark["blocks"], mark["block_bytes"]), None)
    if "ends" in mark and _ends(path) != mark["ends"]:
        return "its first or last MiB differs from what was written"
    return None


def _wrong_blocks(path: Path, size: int, saved: Sequence[str], block_bytes: int) -> Iterator[str]:
    now = list(file_checksums(path, min(block_bytes, max(1, size))))
    if len(now) != len(saved):
        yield f"{len(now)} blocks, {len(saved)} when it was written"
    for number, (before, after) in enumerate(zip(saved, now)):
        if before != after:
            last = min((number + 1) * block_bytes, size) - 1
            yield f"the block of bytes {number * block_bytes} to {last} differs from what was written"


def _ends(path: Path) -> str:
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as file:
        for start in (0, max(0, size - _END_BYTES)):
            file.seek(start, os.SEEK_SET)
            crc = zlib.crc32(file.read(_END_BYTES), crc)
    return f"{crc:08x}"

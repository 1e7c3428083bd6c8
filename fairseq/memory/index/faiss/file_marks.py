"""Marks that detect an exchanged or damaged index file: its size and a checksum of its ends."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_END_BYTES = 1 << 20


def file_mark(path: Path) -> dict[str, Any]:
    """A mark that identifies a file: its size and a checksum of its first and last megabyte."""
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as file:
        for start in (0, max(0, size - _END_BYTES)):
            file.seek(start)
            crc = zlib.crc32(file.read(_END_BYTES), crc)
    return {"bytes": size, "ends": f"{crc:08x}"}


def check_marks(index: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError when a file is not the one that was described."""
    for ending, mark in metadata.get("files", {}).items():
        path = Path(f"{index}{ending}")
        if not path.exists():
            raise ValueError(f"{path} is missing: it holds the lists of {index}; copy it too, or rebuild the index")
        actual = file_mark(path)
        if actual != mark:
            raise ValueError(
                f"{path} is not the file that {index}.json describes ({actual['bytes']} bytes, {mark['bytes']} then): "
                "it is cut short, damaged or another index's; copy both again, or rebuild it with build_dstore.py"
            )

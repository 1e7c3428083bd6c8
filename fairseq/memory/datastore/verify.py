"""Compares the files of a datastore with the checksums that were taken when they were written."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq.memory.datastore.metadata import Part
from fairseq.runtime.files import file_checksums

_LONGEST_SEARCH = 8 << 20  # bytes of a block; among more, too many places would explain one checksum


def damage(parts: Sequence[Part]) -> Iterator[str]:
    """A line for every block that differs from what was saved, naming the file and the bytes."""
    for part in parts:
        names = {"keys": part.names.keys, "values": part.names.values, "documents": part.names.documents}
        for array, saved in part.about["checksums"].items():
            yield from _damage(names[array], saved, part.about["block_bytes"])


def _damage(path: Path, saved: Sequence[str], block_bytes: int) -> Iterator[str]:
    size = path.stat().st_size
    now = list(file_checksums(path, block_bytes))
    if len(now) != len(saved):
        yield f"{path}: {size} bytes are {len(now)} blocks, {len(saved)} were saved"
    for number, (before, after) in enumerate(zip(saved, now)):
        if before == after:
            continue
        first, last = number * block_bytes, min((number + 1) * block_bytes, size) - 1
        single = "of several"
        if last - first < _LONGEST_SEARCH:
            places = [str(first + place) for place in _single_bytes(int(before, 16) ^ int(after, 16), last - first + 1)]
            single = f"byte {' or '.join(places)} if only one does" if places else "more than one byte"
        yield f"{path}: the block of bytes {first} to {last} differs from what was saved ({single})"


def _single_bytes(difference: int, length: int) -> list[int]:
    """Places in a block where one changed byte explains the difference of its CRC-32.

    A CRC is linear: the difference depends on the change and on how many bytes follow it, not on the content. So the
    difference is taken back byte by byte until it is one that a last byte makes.
    """
    table, by_top = _tables()
    changes = set(table[1:])
    places = []
    for place in range(length - 1, -1, -1):
        if difference in changes:
            places.append(place)
        index = by_top[difference >> 24]
        difference = ((difference ^ table[index]) << 8 | index) & 0xFFFFFFFF
    return places[::-1]


@functools.cache
def _tables() -> tuple[list[int], list[int]]:
    """Effect of each byte on a CRC-32, and the byte by the top byte of its effect."""
    table = [zlib.crc32(bytes([byte])) ^ zlib.crc32(b"\0") for byte in range(256)]
    by_top = [0] * 256
    for byte, value in enumerate(table):
        by_top[value >> 24] = byte
    return table, by_top

"""Compares the files of a datastore with the checksums saved when they were written."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fairseq.memory.datastore.metadata import Shard
from fairseq.runtime.files import file_checksums

_LONGEST_SEARCH = 8 << 20  # bytes of a block; in a longer one, too many positions would explain the checksum


def damage(shards: Sequence[Shard]) -> Iterator[str]:
    """Yield a line for every block that differs from the saved one, naming the file and the bytes."""
    for shard in shards:
        names = {"keys": shard.names.keys, "values": shard.names.values, "documents": shard.names.documents}
        for array, saved in shard.metadata["checksums"].items():
            yield from _damage(names[array], saved, shard.metadata["block_bytes"])


def _damage(path: Path, saved: Sequence[str], block_bytes: int) -> Iterator[str]:
    size = path.stat().st_size
    now = list(file_checksums(path, block_bytes))
    if len(now) != len(saved):
        yield f"{path}: {size} bytes are {len(now)} blocks, {len(saved)} were saved"
    for number, (before, after) in enumerate(zip(saved, now)):
        if before == after:
            continue
        first, last = number * block_bytes, min((number + 1) * block_bytes, size) - 1
        cause = "of several"
        if last - first < _LONGEST_SEARCH:
            positions = [
                str(first + position) for position in _single_bytes(int(before, 16) ^ int(after, 16), last - first + 1)
            ]
            cause = f"byte {' or '.join(positions)} if only one does" if positions else "more than one byte"
        yield f"{path}: the block of bytes {first} to {last} differs from what was saved ({cause})"


def _single_bytes(difference: int, length: int) -> list[int]:
    """Positions in a block at which one changed byte explains the difference of its CRC-32.

    A CRC is linear: the difference depends on the change and on the number of bytes after it, not on the content. So
    the difference is reverted byte by byte until it equals that of a changed last byte.
    """
    table, by_top = _tables()
    changes = set(table[1:])
    positions = []
    for position in range(length - 1, -1, -1):
        if difference in changes:
            positions.append(position)
        index = by_top[difference >> 24]
        difference = ((difference ^ table[index]) << 8 | index) & 0xFFFFFFFF
    return positions[::-1]


@functools.cache
def _tables() -> tuple[list[int], list[int]]:
    """Effect of each byte on a CRC-32, and the byte by the top byte of its effect."""
    table = [zlib.crc32(bytes([byte])) ^ zlib.crc32(b"\0") for byte in range(256)]
    by_top = [0] * 256
    for byte, value in enumerate(table):
        by_top[value >> 24] = byte
    return table, by_top

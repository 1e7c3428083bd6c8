"""The files of a datastore, and what files that survive a kill are made of: atomic writes, a lock, checksums."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq.runtime.atomic_files import may_write_in, replacing

_WAY_OUT = "copy it again, or remove it and run the command that writes it"

BLOCK_BYTES = 4 << 20
"""A checksum covers this many bytes: a flipped bit in a store of hundreds of GB is found near its place, and the
metadata stay within a few MB."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a reader, or we after a kill, sees the old one or the new one, whole."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: ValueError naming the file when it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged or not ours: {_WAY_OUT}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object; it is damaged or not ours: {_WAY_OUT}")
    return content


def may_create_in(folder: Path) -> None:
    """Make the folder if need be and check that a file can be made there. Raises: OSError with the folder's name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not may_write_in(folder):
            raise PermissionError("it is read-only")
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write in {str(folder)!r}: {error.strerror or error}; choose another folder") from None


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file while the block runs. The system lifts the lock of a killed process.

    Args:
        seconds: how long to wait for another process that holds it.
    Raises: OSError when another process holds it.
    """
    import fcntl  # not there on Windows, where this module must still import

    deadline = time.monotonic() + seconds
    while True:
        file = open(path, "ab")  # noqa: SIM115 - closed below, after the name is gone
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise OSError(f"another process is writing {what} (lock {str(path)!r}); wait for it or stop it") from None
        # Whoever held the lock before may have removed the name: only the file that carries it now counts.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:
            file.close()


class BlockChecksums:
    """CRC-32 of each block of a growing file; its state is plain, so that it outlives a kill."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Start at nothing, or where ``state()`` of another one was taken."""
        state = state or {"blocks": [], "crc": 0, "filled": 0}
        self._blocks: list[int] = list(state["blocks"])
        self._crc: int = state["crc"]
        self._filled: int = state["filled"]

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        while len(data):
            part = data[: BLOCK_BYTES - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._blocks.append(self._crc)
                self._crc = self._filled = 0

    def state(self) -> dict[str, Any]:
        """Its state, as plain types."""
        return {"blocks": list(self._blocks), "crc": self._crc, "filled": self._filled}

    def digests(self) -> list[str]:
        """One hexadecimal word per block, the last one shorter than the others."""
        crcs = self._blocks + ([self._crc] if self._filled else [])
        return [f"{crc:08x}" for crc in crcs]


def file_checksums(path: Path, block_bytes: int) -> Iterator[str]:
    """The checksums of a file on disk, block by block."""
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            yield f"{zlib.crc32(block):08x}"

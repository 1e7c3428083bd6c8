"""Building blocks of crash-safe files: atomic JSON, a lock and checksums."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fairseq.runtime.atomic_files import may_write_in, replacing

DAMAGED = "copy it again, or remove it and run the command that writes it"
"""The way out of most damaged files, as a clause of a message."""

_DEEPEST = 64  # levels of JSON: our files have eight, and some hundreds end in a RecursionError somewhere else

_SECONDS_TO_SIGN = 1.0

BLOCK_BYTES = 4 << 20
"""Bytes per checksum: small enough to locate a flipped bit in a store of hundreds of GB, large enough to keep the
metadata within a few MB."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a reader, also after a kill, sees either the old or the new one, complete."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, fix: str = DAMAGED) -> dict[str, Any]:
    """Read a JSON object; ``records.read_record`` compares its entries with a schema too.

    Raises: ValueError naming the file when it holds anything else.
    """
    content = parse_json(path.read_bytes(), str(path), fix)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: it is damaged or of another program; {fix}")
    return content


def parse_json(text: str | bytes, name: str, fix: str = DAMAGED) -> Any:
    """Parse JSON that is at most 64 levels deep.

    Args:
        name: the file's, for the message.
        fix: the way out, an imperative clause.
    Raises: ValueError naming the file.
    """
    try:
        content = json.loads(text)
        level, depth = [content], 0
        while level:
            depth += 1
            if depth > _DEEPEST:
                raise RecursionError(f"more than {_DEEPEST} levels")
            nested = (value for value in level if isinstance(value, (dict, list)))
            level = [item for value in nested for item in (value.values() if isinstance(value, dict) else value)]
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is not JSON ({error}): it is damaged or of another program; {fix}") from None
    return content


def may_create_in(folder: Path) -> None:
    """Create the folder if needed and check that it accepts files. Raises: OSError with the folder's name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not may_write_in(folder):
            raise PermissionError("it is read-only")
        with tempfile.TemporaryFile(dir=folder):  # nameless where the system can: a kill leaves nothing behind
            pass
    except OSError as error:
        raise OSError(f"cannot write in {str(folder)!r}: {error.strerror or error}; choose another folder") from None


class LockedError(OSError):
    """Another process holds a lock; the message names it."""


def require_free_space(folder: Path, num_bytes: int, what: str, advice: str) -> None:
    """Raise OSError with both numbers unless the disk of a folder has room.

    Args:
        num_bytes: bytes that are still to be written.
        what: names the output, at the head of the message.
        advice: how it could be smaller, at its end.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{what} needs {num_bytes} more bytes, {str(folder.resolve())!r} has {free} free; free some, choose "
            f"another disk, or {advice}"
        )


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file while the block runs. The system releases the lock of a killed process.

    Args:
        seconds: time to wait for another process that holds it.
    Raises: LockedError when another process holds it.
    """
    import fcntl  # missing on Windows, where this module must still import

    start = time.monotonic()
    while True:
        file = open(path, "ab")  # noqa: SIM115 - closed below, after the name is removed
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            waited, holder = time.monotonic() - start, _holder(path)
            # A holder without a name has just begun, and will write it, or has just ended.
            if waited < seconds or (holder is None and waited < _SECONDS_TO_SIGN):
                time.sleep(0.05 if holder else 0.002)
                continue
            raise LockedError(
                f"another process is writing {what} ({holder or 'of unknown number'}, lock {str(path)!r}); wait for it "
                "or stop it"
            ) from None
        # The previous holder may have removed the name: only the file that has the name now counts.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
    file.flush()
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:
            file.close()


def _holder(path: Path) -> str | None:
    """The process that wrote its number into a lock file; None where none has."""
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return f"process {pid} on {host}"


class BlockChecksums:
    """CRC-32 of each block of a growing file; its state is plain data, saved to resume after a kill."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Start empty, or from the ``state()`` of another one."""
        state = state or {"blocks": [], "crc": 0, "filled": 0}
        self._blocks: list[int] = list(state["blocks"])
        self._crc: int = state["crc"]
        self._filled: int = state["filled"]

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        while len(data):
            chunk = data[: BLOCK_BYTES - self._filled]
            self._crc = zlib.crc32(chunk, self._crc)
            self._filled += len(chunk)
            data = data[len(chunk) :]
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

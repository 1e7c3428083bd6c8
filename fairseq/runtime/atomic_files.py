"""Files that appear whole or not at all, and failures that say which file they are about."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError of the block the file's name: a failed write or sync does not know it (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """The file of :func:`replacing`, open; its content is on the disk before it gets its name."""
    with replacing(path) as aside, open(aside, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a file to write, which becomes ``path`` when the block ends and is gone when the block fails."""
    aside = f"{os.fspath(path)}.tmp"
    try:
        with naming(path):
            yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, whole."""
    with writing(path) as file:
        file.write(text)


def may_write_in(folder: str | os.PathLike[str]) -> bool:
    """True if files may be added to a folder: its mode allows it and so does the system (root honours the mode)."""
    return os.path.isdir(folder) and bool(os.stat(folder).st_mode & 0o222) and os.access(folder, os.W_OK)


def require_writable(folder: str | os.PathLike[str], flag: str) -> None:
    """Raise ValueError unless a folder, or the nearest one above it that exists, takes new files."""
    place = os.path.abspath(folder)
    while not os.path.exists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    if not may_write_in(place):
        raise ValueError(f"{flag}: {str(folder)!r} cannot be written ({place} takes no new files); give another place")

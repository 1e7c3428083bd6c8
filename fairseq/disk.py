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

"""Files that appear complete or not at all, and OSErrors that name their file."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to an OSError of the block: a failed write or sync (a full disk) lacks it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """The file of :func:`replacing`, opened; its content is synced to disk before the file gets its name."""
    with (
        replacing(path) as temporary,
        open(temporary, "wb" if binary else "w", encoding=None if binary else "utf-8") as file,
    ):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a temporary file, which becomes ``path`` when the block ends and is removed when it fails.

    The name is that of this process, so that two that write the same file do not meet in it; what killed ones left is
    removed. Missing folders are made.
    """
    path = os.fspath(path)
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        with naming(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            _remove_leftovers(path)
            yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _remove_leftovers(path: str) -> None:
    """Remove the temporary files of processes of this host that no longer run."""
    for leftover in glob.glob(f"{glob.escape(path)}.{glob.escape(socket.gethostname())}-*.tmp"):
        pid = leftover[: -len(".tmp")].rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and not _is_running(int(pid)):
            with contextlib.suppress(OSError):
                os.remove(leftover)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that a reader sees either the old or the new one, complete."""
    with writing(path) as file:
        file.write(text)


def may_write_in(folder: str | os.PathLike[str]) -> bool:
    """True if files may be added to a folder: its mode allows it and so does the system (root honours the mode)."""
    return os.path.isdir(folder) and bool(os.stat(folder).st_mode & 0o222) and os.access(folder, os.W_OK)


def require_writable(folder: str | os.PathLike[str], flag: str) -> None:
    """Raise ValueError unless a folder, or its nearest existing parent, accepts new files."""
    existing = os.path.abspath(folder)
    while not os.path.exists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    if not may_write_in(existing):
        raise ValueError(
            f"{flag}: {str(folder)!r} cannot be written ({existing} accepts no new files); give another folder"
        )

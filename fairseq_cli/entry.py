"""Start of every command; user errors print one line and exit with status 2."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

logger = logging.getLogger(__name__)

_NO_ROOM = {
    errno.ENOSPC: "no space left on the disk; free some",
    errno.EDQUOT: "the disk quota is used up; free some",
    errno.EFBIG: "files may not grow so large here; raise the limit (ulimit -f)",
}


def run(program: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main`` with the arguments; a ValueError or OSError becomes one line and exit status 2.

    ``FAIRSEQ_TRACEBACK=1`` shows the whole traceback instead, to debug this package.
    """
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stderr,
    )
    keep_freed_memory()
    collect_seldom()
    try:
        with reporting() as output:
            main(sys.argv[1:] if argv is None else argv)
        output.end(program)
    except (ValueError, OSError) as error:
        if os.environ.get("FAIRSEQ_TRACEBACK"):
            raise
        _print_error(program, _in_one_line(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(130)


class ReportStream:
    """Standard output that a command may lose (closed, a full disk, a pipe nobody reads) without losing its work."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: OSError | None = None if stream is not None else OSError(errno.EBADF, os.strerror(errno.EBADF))

    def write(self, text: str) -> int:
        """Write unless the stream is lost."""
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush unless the stream is lost."""
        self._attempt(lambda stream: stream.flush())

    def end(self, program: str) -> None:
        """Exit with one line if the report did not arrive; with the status of a broken pipe if nobody read it."""
        self.flush()
        if self.lost is None:
            return
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered must not fail once more at exit
        if self.lost.errno == errno.EPIPE:
            sys.exit(128 + 13)
        _print_error(program, f"standard output was lost ({self.lost.strerror}); the files are written")
        sys.exit(2)

    def _attempt(self, work: Callable[[TextIO], object]) -> None:
        if self._stream is None or self.lost is not None:
            return
        try:
            work(self._stream)
        except OSError as error:
            self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def reporting() -> Iterator[ReportStream]:
    """Replace standard output by one that may be lost."""
    before: Any = sys.stdout
    stream = ReportStream(before)
    sys.stdout = stream
    try:
        yield stream
    finally:
        sys.stdout = before


def keep_freed_memory() -> None:
    """Let glibc hand freed tensors out again. By default they go back to the system, and getting as many pages
    again costs small batches on a CPU a tenth of their time."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc would choose by itself
        mallopt(trim_threshold, 512 << 20)


def collect_seldom() -> None:
    """Let Python look for unreachable cycles at every 50,000 new objects instead of 700, and not once more at exit.

    Importing PyTorch makes objects that stay: passing over them takes 0.2 of 1.6 s, and at exit as long.
    """
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)


def _print_error(program: str, message: str) -> None:
    """Print the line. Processes that train together find the same mistake: the first prints it, the others log it."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        sys.stderr.write(f"{program}: error: {message}\n")
    else:
        logger.error("process %s: %s", rank, message)


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, OSError):
        return message
    if error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{_NO_ROOM[error.errno]} and run the same command again: training, saving a store and building an "
            "index resume"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file: {error.filename}"
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; check the name and who may read or write there"
    return message

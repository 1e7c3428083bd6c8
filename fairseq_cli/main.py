"""How every command starts and how it tells a user's mistake: one line and exit status 2."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence


def run(program: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command's words; a ValueError or OSError becomes one line and exit status 2.

    ``FAIRSEQ_TRACEBACK=1`` shows the whole traceback instead, for those who look for a fault of ours.
    """
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stderr,
    )
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        if os.environ.get("FAIRSEQ_TRACEBACK"):
            raise
        sys.stderr.write(f"{program}: error: {_in_one_line(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        sys.exit(130)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"no space left on the disk{where}; free some and run the same command again: it goes on where it was"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__

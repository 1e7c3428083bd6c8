"""The commands."""

import os
import sys
from types import TracebackType


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report Ctrl-C while a command still imports its modules, before ``entry.run`` can catch it."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: interrupted\n")
        sys.stderr.flush()
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end_in_one_line

try:
    import fairseq  # noqa: F401  it rejects sharing its name with another distribution
except ImportError as error:
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {error}\n")
    sys.exit(2)

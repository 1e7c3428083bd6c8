"""The commands."""

import os
import sys

try:
    import fairseq  # noqa: F401  it rejects sharing its name with another distribution
except ImportError as error:
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {error}\n")
    sys.exit(2)

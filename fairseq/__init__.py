"""Memory-augmented language models: kNN-LM and its relatives, with fairseq's commands and files."""

import os as _os
import sys as _sys

from fairseq import moved as _moved

__version__ = "0.1.0"


def _refuse_second_fairseq() -> None:
    """Raise ImportError when PyPI's ``fairseq`` shares this environment: both would claim one package name."""
    for folder in _sys.path:
        try:
            names = _os.listdir(folder or ".")
        except OSError:
            continue
        # Names are enough: importlib.metadata takes 50 ms to import, as long as all else here.
        other = next((n for n in names if n.startswith("fairseq-") and n.endswith((".dist-info", ".egg-info"))), None)
        if other is not None:
            version = other.split("-")[1].removesuffix(".dist").removesuffix(".egg")
            raise ImportError(
                f"the distribution 'fairseq' {version} is installed beside "
                f"'fairseq-memory' {__version__}, and both provide the package 'fairseq'; run: pip uninstall fairseq "
                "(or use a fresh virtual environment)"
            )


_refuse_second_fairseq()
_moved.install()

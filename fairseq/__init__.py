"""Memory-augmented language models: kNN-LM and its relatives, with fairseq's commands and files."""

from importlib import metadata as _metadata

__version__ = "0.1.0"


def _refuse_second_fairseq() -> None:
    """Raise ImportError when PyPI's ``fairseq`` shares this environment: both would claim one package name."""
    try:
        other = _metadata.version("fairseq")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'fairseq' {other} is installed beside 'fairseq-memory' {__version__}, and both provide "
        "the package 'fairseq'; run: pip uninstall fairseq (or use a fresh virtual environment)"
    )


_refuse_second_fairseq()

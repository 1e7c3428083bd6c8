"""Names that a package exports but imports only on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

_EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "gguf": "hf",
    "accelerate": "hf",
    "datasets": "hf",
    "pyarrow": "hf",
    "matplotlib": "plot",
    "ray": "ray",
    "pyserini": "pyserini",
    "tensorboard": "track",
    "wandb": "track",
}


class MissingExtraError(ImportError, ValueError):
    """An optional package is not installed; the message holds the pip command."""


def missing_extra(error: ModuleNotFoundError) -> ImportError:
    """The error to raise instead: one line with the pip command if the module belongs to one of our extras."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return error
    return MissingExtraError(
        f"{package} is not installed; pip install 'fairseq-memory[{extra}]' brings it", name=error.name
    )


def lazy_names(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: ``__name__`` of the package.
        table: name -> module that defines it.
    The former raises AttributeError with the nearest name for an unknown one, and MissingExtraError where the module
    needs an optional package.
    """

    def load(name: str) -> Any:
        if name not in table:
            from fairseq.registry import did_you_mean

            hint = "" if name.startswith("__") else did_you_mean(name, table)
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        try:
            return getattr(importlib.import_module(table[name]), name)
        except ModuleNotFoundError as error:
            raise missing_extra(error) from error

    return load, lambda: sorted(table)

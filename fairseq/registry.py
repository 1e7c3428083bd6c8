"""Tables of named things: look one up, or say which names exist and which one was probably meant."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return ``table[name]``. ``what`` names the kind of thing, e.g. "--arch".

    Raises: ValueError with the nearest and all known names.
    """
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}{did_you_mean(name, table)}; known: {', '.join(sorted(table))}")


@dataclass(frozen=True)
class Entry:
    """A named part: its config class, and where its implementation is, imported only when it is used.

    Configs are light and make the flags; implementations import torch, which takes seconds: ``--help`` needs only
    the former.
    """

    config: type
    """Frozen dataclass with the part's flags."""
    target: str | Callable[..., Any]
    """``"package.module:Name"``, or the class or function itself (plug-ins)."""

    def load(self) -> Callable[..., Any]:
        """Import and return the implementation."""
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return loaded


def registrar(table: dict[str, T], what: str) -> Callable[[str], Callable[[T], T]]:
    """Make the ``register_*`` decorator of a table, for plug-ins loaded with ``--user-dir``.

    The project's own entries are lines in the table, so that one grep finds them.
    """

    def register(name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if table.get(name, entry) is not entry:
                raise ValueError(f"{what} {name!r} is registered twice; choose another name in the plug-in")
            table[name] = entry
            return entry

        return add

    return register

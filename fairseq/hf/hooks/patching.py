"""Attributes and methods of an object that are replaced until they are restored, in whatever order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_RESTORED = "_fairseq_restored"
"""On a replacement that was removed while another one stood before it: the attribute it had replaced, in a tuple."""


def replace_attribute(owner: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Set an attribute of one object, over its class's; returns a function that restores it.

    Others may have replaced it again by the time it is restored (accelerate and a second wrapper do). Their
    replacement then stays; ``value`` remains reachable through it and must by then act as what it replaced.
    """
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    setattr(owner, name, value)

    def restore() -> None:
        if owner.__dict__.get(name) is not value:
            value.__dict__[_RESTORED] = (before,) if had else ()
            return
        delattr(owner, name)
        original = _original(before) if had else ()
        if original:
            setattr(owner, name, original[0])

    return restore


def _original(before: object) -> tuple[object, ...]:
    """The attribute below replacements that have been restored; nothing if the class's own is there."""
    restored = getattr(before, "__dict__", {}).get(_RESTORED)
    if restored is None:
        return (before,)
    return _original(restored[0]) if restored else ()


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give one module another ``forward``; returns a function that restores its own."""
    return replace_attribute(module, "forward", forward)


def wrapped(own: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(own, ...)`` with the signature of ``own``, which transformers reads."""
    return functools.wraps(own)(functools.partial(wrapper, own))

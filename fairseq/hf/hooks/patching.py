"""Attributes and methods of an object that are replaced until they are restored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def replace_attribute(owner: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Set an attribute of one object, over its class's; returns a function that restores it."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    setattr(owner, name, value)

    def restore() -> None:
        delattr(owner, name)
        if had:
            setattr(owner, name, before)

    return restore


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give one module another ``forward``; returns a function that restores its own."""
    return replace_attribute(module, "forward", forward)


def wrapped(own: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(own, ...)`` with the signature of ``own``, which transformers reads."""
    return functools.wraps(own)(functools.partial(wrapper, own))

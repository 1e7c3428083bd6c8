"""Attributes and methods of an object that are replaced until they are restored, in whatever order."""

from __future__ import annotations

import functools
import sys
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


def wrapped(owner: nn.Module, own: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(own, ...)`` with the signature of ``own``, which transformers reads.

    Others may bind it to its owner as if it were a function of the class (accelerate does, when it unwraps a model of
    half precision): the owner is then no argument.
    """
    # A partial, because a copy of the owner must get one of its own; functions are not copied.
    return functools.wraps(own)(functools.partial(_without_owner, owner, wrapper, own))


def _without_owner(
    owner: nn.Module, wrapper: Callable[..., Any], own: Callable[..., Any], /, *inputs: Any, **named: Any
) -> Any:
    return wrapper(own, *(inputs[1:] if inputs and inputs[0] is owner else inputs), **named)


def is_running(function: Callable[..., Any]) -> bool:
    """True if a function, method or partial of one is on this thread's stack of calls."""
    owner = None
    while not hasattr(function, "__code__") or hasattr(function, "__func__"):
        inside = getattr(function, "__func__", None) or getattr(function, "func", None)
        if inside is None:
            return False
        owner = getattr(function, "__self__", None) or next(iter(getattr(function, "args", ())), None) or owner
        function = inside
    code, frame = function.__code__, sys._getframe().f_back
    while frame is not None:
        # One function may stand in for the forward of every module (accelerate has it so); its owner comes first.
        is_owners = not isinstance(owner, nn.Module) or frame.f_locals.get(code.co_varnames[0]) is owner
        if frame.f_code is code and is_owners:
            return True
        frame = frame.f_back
    return False

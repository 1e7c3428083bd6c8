"""Continuous batching of transformers, which some memories cannot take part in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from fairseq.hf.hooks.patching import replace_attribute

_METHODS = ("generate_batch", "init_continuous_batching")


@contextlib.contextmanager
def rejecting_continuous_batching(model: nn.Module, message: str) -> Iterator[None]:
    """While the block runs, the methods of a model that begin continuous batching raise ValueError."""
    with contextlib.ExitStack() as undo:
        for name in _METHODS:
            if hasattr(model, name):
                undo.callback(replace_attribute(model, name, functools.partial(_reject, model, name, message)))
        yield


def _reject(model: nn.Module, name: str, message: str, /, *inputs: object, **named: object) -> NoReturn:
    raise ValueError(message)

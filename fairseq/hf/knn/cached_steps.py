"""RetoMaton's steps kept with the key-value cache of the sequences they belong to, by position.

A cache that is reordered, cropped, repeated, reset or copied takes its steps along: while it is tracked, its class is a
subclass of its own one that does the same to the steps. Steps are found by the number of tokens in the cache, so
that a cropped cache continues from the step of its last token.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairseq.hf.hooks.protocols import KeyValueCache
from fairseq.memory.retomaton.automaton import RetomatonStep

_STEPS = "_retomaton_steps"
_KEPT_BYTES = 64 << 20
"""Of steps per cache; a cache that is cropped further back begins anew, with a search."""
_BYTES_PER_CANDIDATE = 21  # row, token, score, and whether it counts
_owners = itertools.count()


class CachedSteps:
    """The steps of B sequences by the number of tokens in their cache, up to the last token they were looked up at."""

    def __init__(self, owner: int) -> None:
        self.owner, self.length = owner, 0
        self.steps: dict[int, RetomatonStep] = {}

    def copied(self) -> CachedSteps:
        """The same for a copy of the cache."""
        other = CachedSteps(self.owner)
        other.length, other.steps = self.length, dict(self.steps)
        return other

    def select(self, sequences: Tensor) -> None:
        """Keep the steps of some sequences, by number; one may come twice."""
        self.steps = {length: step.select(sequences) for length, step in self.steps.items()}

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.steps:
            count = len(next(iter(self.steps.values())).rows_BM)
            self.select(torch.arange(count).repeat_interleave(repeats))

    def clear(self) -> None:
        """Forget everything."""
        self.steps, self.length = {}, 0

    def cut(self, length: int) -> None:
        """Forget what comes after so many tokens."""
        self.steps = {at: step for at, step in self.steps.items() if at <= length}

    def add(self, steps: dict[int, RetomatonStep]) -> None:
        """Add the steps of a call; the oldest are dropped beyond a number of bytes."""
        self.steps |= steps
        sizes = {at: step.rows_BM.numel() * _BYTES_PER_CANDIDATE for at, step in self.steps.items()}
        total = sum(sizes.values())
        for at in sorted(sizes)[:-1]:
            if total <= _KEPT_BYTES:
                break
            total -= sizes[at]
            del self.steps[at]


_CHANGES: dict[str, Callable[..., None]] = {
    "reorder_cache": CachedSteps.select,
    "batch_select_indices": CachedSteps.select,
    "batch_repeat_interleave": CachedSteps.repeat,
    "reset": CachedSteps.clear,
}


class StepKeeper:
    """Finds and keeps the steps of caches; one per attached wrapper, whose steps no other one reads."""

    def __init__(self) -> None:
        self._owner = next(_owners)
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def of(self, cache: KeyValueCache | None) -> CachedSteps | None:
        """The steps kept with a cache."""
        steps: CachedSteps | None = None if cache is None else getattr(cache, "__dict__", {}).get(_STEPS)
        return steps if steps is not None and steps.owner == self._owner else None

    def find(self, cache: KeyValueCache | None, counted: int | None) -> tuple[int, RetomatonStep | None]:
        """Tokens in a cache before a call, and the step at the last of them; None where a sequence begins anew.

        Args:
            counted: what the cache said before the call; None for a cache that does not count its tokens.
        """
        kept = self.of(cache)
        length = counted if counted is not None else kept.length if kept is not None else 0
        if kept is None:
            return length, None
        kept.cut(length)
        return length, kept.steps.get(length)

    def keep(self, cache: KeyValueCache, length: int, steps: dict[int, RetomatonStep]) -> None:
        """Keep the steps of a call with the cache, which then holds ``length`` tokens."""
        kept = self.of(cache)
        if kept is None:
            if not _track(cache):
                return
            kept = CachedSteps(self._owner)
            cache.__dict__[_STEPS] = kept
            self._caches.add(cache)
        kept.add(steps)
        kept.length = length

    def close(self) -> None:
        """Restore all caches."""
        for cache in list(self._caches):
            _untrack(cache)


def max_steps(batch_size: int, candidates: int) -> int:
    """Positions of a call whose steps are worth keeping: as many as fit, of at most so many candidates each."""
    return max(1, min(256, _KEPT_BYTES // max(1, batch_size * candidates * _BYTES_PER_CANDIDATE)))


def _track(cache: KeyValueCache) -> bool:
    """Make a cache take its steps along; False where its class does not allow that."""
    if hasattr(type(cache), "_untracked"):
        return True
    try:
        cache.__class__ = _tracking(type(cache))
    except TypeError:
        return False
    return True


def _untrack(cache: Any) -> None:
    cache.__dict__.pop(_STEPS, None)
    if hasattr(type(cache), "_untracked"):
        cache.__class__ = type(cache)._untracked


def _untracked_cache(kind: type, state: dict[str, Any]) -> Any:
    """A cache of a class with some attributes, whose tensors it shares."""
    cache: Any = object.__new__(kind)
    cache.__dict__ = state
    return cache


@functools.cache
def _tracking(kind: type) -> type:
    """A subclass of a class of caches whose methods change the steps too."""

    def following(name: str, change: Callable[..., None]) -> Callable[..., Any]:
        own = getattr(kind, name)

        @functools.wraps(own)
        def method(self: Any, *inputs: Any, **named: Any) -> Any:
            result = own(self, *inputs, **named)
            if _STEPS in self.__dict__:
                change(self.__dict__[_STEPS], *inputs, *named.values())
            return result

        return method

    def state(self: Any) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _STEPS}

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        other = copy.deepcopy(_untracked_cache(kind, state(self)), memo)
        other.__class__ = type(self)
        if _STEPS in self.__dict__:
            other.__dict__[_STEPS] = self.__dict__[_STEPS].copied()
        return other

    members: dict[str, Any] = {name: following(name, do) for name, do in _CHANGES.items() if hasattr(kind, name)}
    # Pickled, it is what it was: the subclass cannot be imported.
    members |= {"__deepcopy__": deepcopy, "__reduce_ex__": lambda self, _: (_untracked_cache, (kind, state(self)))}
    members |= {"_untracked": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), members)

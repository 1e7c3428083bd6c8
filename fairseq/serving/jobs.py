"""Work that requests hand to the engine, and what comes back.

Shapes: M candidates.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fairseq.hf.decoding.mixing import Found, KnnSettings
from fairseq.hf.decoding.sampling import SamplingSettings
from fairseq.serving.errors import ApiError

_SECONDS_BETWEEN_EVENTS = 0.02
"""Of a stream. Each takes some tenths of a millisecond, in which the thread that runs the model waits for the
interpreter: with a step of 4 ms, an event for each token costs a fifth of the speed, and nobody reads so fast."""


@dataclass(frozen=True)
class Generation:
    """A prompt, and what is wanted of its continuations."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingSettings = SamplingSettings()
    num_choices: int = 1
    """Continuations; with a seed the next one has the next seed."""
    stops: tuple[str, ...] = ()
    store: str | None = None
    """Name of the store; None for the model alone."""
    knn: KnnSettings | None = None
    """Options for the store."""
    mind: tuple[tuple[str, Any], ...] = ()
    """Options of Extended Mind for this request, by name."""
    num_neighbors: int = 0
    """Neighbours to return for each token."""
    num_top: int | None = None
    """Log-probabilities to return for each token besides its own; None for none at all."""
    echo: bool = False
    """The prompt is returned too, with its log-probabilities where these are wanted."""


@dataclass(frozen=True)
class TokenEvent:
    """A token of a choice; a choice with a prompt that is returned begins with the prompt's."""

    choice: int
    token: int
    text: str
    """Text that can be sent; it may belong to earlier tokens."""
    offset: int = 0
    """Characters of the choice's text before the token."""
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities."""
    found: Found | None = None
    store: str | None = None
    is_prompt: bool = False


@dataclass(frozen=True)
class ChoiceEnd:
    """A choice is complete."""

    choice: int
    reason: str
    """``stop`` or ``length``."""
    text: str = ""
    """Text that was held back."""


@dataclass(frozen=True)
class Failure:
    """The work failed."""

    error: ApiError


Event = TokenEvent | ChoiceEnd | Failure


@dataclass(frozen=True)
class Outcome:
    """Result of a task."""

    value: Any


class Mailbox:
    """Events for one job of a request, handed from the engine's thread to the loop that answers."""

    def __init__(self, queue: asyncio.Queue[tuple[int, list[Any]]], number: int = 0, *, streams: bool = False) -> None:
        """Belong to the running loop.

        Args:
            queue: of the request; events come with the number of the job.
            number: that of the job among those of the request.
            streams: True delivers events as they come, at most so many times a second; False all at the end.
        """
        self._loop = asyncio.get_running_loop()
        self._queue, self._number, self._streams = queue, number, streams
        self._waiting: list[Any] = []
        self._delivered = 0.0

    def put(self, events: list[Any], *, is_last: bool) -> None:
        """Deliver some events; called by the engine."""
        self._waiting += events
        now = time.perf_counter()
        is_due = self._streams and now - self._delivered >= _SECONDS_BETWEEN_EVENTS
        if self._waiting and (is_due or is_last):
            self._delivered = now
            batch, self._waiting = self._waiting, []
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (self._number, batch))


@dataclass(eq=False)
class GenerationJob:
    """A generation that waits or runs."""

    request: Generation
    mailbox: Mailbox
    arrived: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False
    """Set by the loop when the client went away."""
    has_begun: bool = False
    num_open: int = 0
    """Choices that are not complete, once it has begun."""


@dataclass(eq=False)
class TaskJob:
    """Other work for the thread that runs the model, in steps between those of generation."""

    steps: Callable[[], Iterator[Any]]
    """Starts the work; the last item that it yields is its result."""
    mailbox: Mailbox
    running: Iterator[Any] | None = None
    latest: Any = None
    is_cancelled: bool = False


Job = GenerationJob | TaskJob

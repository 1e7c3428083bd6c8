"""Runs tasks side by side, each on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    function: Callable[[T], R], tasks: Sequence[T], setup: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """``map(function, tasks)`` on as many threads as torch may use, in the order of the tasks.

    Within a task torch computes on one thread. Tasks are better company than torch's own threads for many small
    operations: those wait for each other after every operation, which on a busy machine costs a time slice each.

    Args:
        setup: called once in each thread, to restrict what else would start threads.
    """
    count = torch.get_num_threads()
    if min(count, len(tasks)) <= 1:
        yield from map(function, tasks)
        return

    def start() -> None:
        torch.set_num_threads(1)  # of the calling thread
        setup()

    try:
        with ThreadPoolExecutor(count, initializer=start) as pool:
            yield from pool.map(function, tasks)
    finally:
        torch.set_num_threads(count)  # threads that start later inherit the latest setting


def run_in_threads(
    function: Callable[[T], object], tasks: Sequence[T], setup: Callable[[], None] = lambda: None
) -> None:
    """:func:`map_in_threads` for what the function does, not for what it returns."""
    for _ in map_in_threads(function, tasks, setup):
        pass


class ObjectPool(Generic[T]):
    """Things that tasks take and give back, made as they are needed: one for each task that runs at the same time."""

    def __init__(self, fresh: Callable[[], T]) -> None:
        """Args.

        fresh: makes one.
        """
        self._fresh = fresh
        self._held: list[T] = []

    @contextmanager
    def borrow(self) -> Iterator[T]:
        """One that no other task has, while the block runs."""
        try:
            taken = self._held.pop()
        except IndexError:  # to look first would not do: another thread may take it in between
            taken = self._fresh()
        yield taken
        self._held.append(taken)


class ThreadBuffer:
    """Memory that each thread keeps: fresh memory for every matrix costs more than the arithmetic in it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        """Args.

        size: numbers that are held; a larger matrix gets memory of its own.
        """
        self._size, self._dtype, self._of_thread = size, dtype, threading.local()

    def __call__(self, rows: int, cols: int) -> Tensor:
        """A matrix whose content means nothing, until the thread asks for the next one."""
        if not hasattr(self._of_thread, "memory"):
            with torch.inference_mode(False):  # what is made in that mode can be written to in that mode only
                self._of_thread.memory = torch.empty(self._size, dtype=self._dtype)
        memory: Tensor = self._of_thread.memory
        return memory[: rows * cols].view(rows, cols) if rows * cols <= self._size else memory.new_empty(rows, cols)

"""Runs tasks side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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

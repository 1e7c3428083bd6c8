"""Parallel tasks, each on one thread."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def _nothing() -> None:
    pass


def map_in_threads(function: Callable[[T], R], tasks: Sequence[T], setup: Callable[[], None] = _nothing) -> Iterator[R]:
    """``map(function, tasks)`` on as many threads as torch may use, in the order of the tasks.

    Within a task torch computes on one thread. For many small operations, one task per thread beats torch's intra-op
    threads, which synchronise after every operation; on a busy machine each wait costs a time slice. Inference mode is
    on in the threads where it is on for the caller: without it they could not write what the caller made.

    Args:
        setup: called once in each thread, to restrict other libraries that start threads; threads are kept for each
            such function, so that it must not be made anew for every call.
    """
    count = torch.get_num_threads()
    if min(count, len(tasks)) <= 1 or getattr(_local, "is_worker", False):
        yield from map(function, tasks)
        return

    inference = torch.is_inference_mode_enabled()

    def run(task: T) -> R:
        with torch.inference_mode(inference):
            return function(task)

    pool = _pool(count, setup)
    futures = [pool.submit(run, task) for task in tasks]
    try:
        for future in futures:
            yield future.result()
    finally:  # nothing runs on when the caller has been told of an error
        for future in futures:
            future.cancel()
        wait(futures)


_local = threading.local()
_pools: dict[tuple[int, Callable[[], None]], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
_has_team = True


def _forget_pools() -> None:
    """A forked process has the pools, and OpenMP's team, but none of their threads."""
    global _pools_lock, _has_team
    _has_team = False
    _pools.clear()
    _pools_lock = threading.Lock()
    _local.is_worker = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def _pool(count: int, setup: Callable[[], None]) -> ThreadPoolExecutor:
    """Threads that wait for tasks: to start new ones, and to tell torch of them, takes longer than many tasks do."""

    def start() -> None:
        _local.is_worker = True
        # Torch gives a thread the latest setting at its first question or parallel loop, whatever was set before.
        torch.get_num_threads()
        torch.set_num_threads(1)  # of the calling thread
        setup()

    with _pools_lock:
        if (count, setup) not in _pools:
            pool = ThreadPoolExecutor(count, initializer=start)
            barrier = threading.Barrier(count)
            try:
                for started in [pool.submit(barrier.wait) for _ in range(count)]:
                    started.result()
            finally:
                torch.set_num_threads(count)  # threads that start later inherit the latest setting
            _pools[count, setup] = pool
        return _pools[count, setup]


def run_in_threads(function: Callable[[T], object], tasks: Sequence[T], setup: Callable[[], None] = _nothing) -> None:
    """:func:`map_in_threads` for a function's side effects; results are discarded."""
    for _ in map_in_threads(function, tasks, setup):
        pass


class ObjectPool(Generic[T]):
    """Objects that tasks borrow and return, created on demand: one for each task that runs at the same time."""

    def __init__(self, make: Callable[[], T]) -> None:
        """Args.

        make: creates an object.
        """
        self._make = make
        self._idle: list[T] = []

    @contextmanager
    def borrow(self) -> Iterator[T]:
        """An object that no other task uses while the block runs."""
        item = self.take()
        yield item
        self.put(item)

    def take(self) -> T:
        """An object that no other task uses until it is put back: :meth:`borrow` where a generator takes too long."""
        try:
            return self._idle.pop()
        except IndexError:  # a check first would race: another thread may pop in between
            return self._make()

    def put(self, item: T) -> None:
        """Let others use an object that was taken."""
        self._idle.append(item)


class ThreadBuffer:
    """Scratch memory of each thread: fresh memory for every matrix costs more than its arithmetic."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        """Args.

        size: numbers in the buffer; a larger matrix gets memory of its own.
        """
        self._size, self._dtype, self._local = size, dtype, threading.local()

    def __call__(self, rows: int, cols: int) -> Tensor:
        """A matrix with undefined content, valid until the thread requests the next one."""
        if not hasattr(self._local, "memory"):
            with torch.inference_mode(False):  # tensors made in inference mode are writable only in it
                self._local.memory = torch.empty(self._size, dtype=self._dtype)
        memory: Tensor = self._local.memory
        return memory[: rows * cols].view(rows, cols) if rows * cols <= self._size else memory.new_empty(rows, cols)


def openmp_team() -> tuple[int, int]:
    """Address of OpenMP's ``GOMP_parallel`` and how many threads torch may use; one where there is no such OpenMP.

    One in a forked process, too, where a team would wait for threads that only its parent has.
    """
    address, threads = _openmp_address() if _has_team else 0, torch.get_num_threads()
    return address, threads if address else 1


@functools.cache
def _openmp_address() -> int:
    """Address of ``GOMP_parallel`` of the OpenMP whose threads torch computes on; 0 where torch has none.

    Its threads are ready within microseconds: they wait for milliseconds after each parallel loop of torch.
    """
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return 0
    try:  # a library finds the names of those that it needs, under whatever file names they were loaded
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):  # another system, or another OpenMP
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0

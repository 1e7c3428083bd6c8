"""Blocks of a store's rows in order, read from the disk while earlier ones are computed with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray, RowReaders

_BYTES_AHEAD = 64 << 20
_THREADS = 2  # one request waits at the disk while another one's bytes arrive


class ReadAhead:
    """Blocks of rows of a store, to be requested nearly in the order given.

    Those of a store larger than memory (``ChunkedArray.exceeds_ram``) are read by threads of their own, some blocks
    ahead of what is requested, around the page cache: other processes keep what they have in it. Blocks of other stores
    are views of the map, as ``ChunkedArray.block`` makes them.

    ```python
    with ReadAhead(store.keys, [slice(0, 4), slice(4, 8)]) as blocks:
        key_MD = blocks.block(0)
    ```
    """

    def __init__(self, keys: ChunkedArray, rows: Sequence[slice]) -> None:
        """Args.

        rows: the blocks, each with a start and a stop.
        """
        self._keys, self._rows = keys, rows
        largest = max((part.stop - part.start for part in rows), default=1)
        self._ahead = max(2, _BYTES_AHEAD // max(1, largest * keys.row_bytes))
        self._lock = threading.Lock()
        self._announced = 0
        self._reads: dict[int, Future[Tensor]] = {}
        self._open = ExitStack()
        self._readers: RowReaders | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> ReadAhead:
        if self._keys.exceeds_ram:
            self._readers = self._open.enter_context(self._keys.opened(direct=True))
            self._pool = ThreadPoolExecutor(_THREADS)
            self._open.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._reads.clear()
        self._open.close()

    def block(self, number: int) -> Tensor:
        """One of the blocks in the keys' own type; it must not be written to. Threads may call it.

        Raises: OSError with the file's name when it cannot be read.
        """
        if self._pool is None:
            return self._read(number)
        with self._lock:
            while self._announced < min(number + self._ahead + 1, len(self._rows)):
                self._reads[self._announced] = self._pool.submit(self._read, self._announced)
                self._announced += 1
            read = self._reads.pop(number, None)
            for passed in [other for other in self._reads if other < number - self._ahead]:
                del self._reads[passed]  # it will not be requested
        return self._read(number) if read is None else read.result()

    def _read(self, number: int) -> Tensor:
        rows = self._rows[number]
        return self._keys.block(rows.start, rows.stop, self._readers)


def iter_blocks(keys: ChunkedArray, step: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """The rows from ``start`` to ``stop`` in blocks of ``step``: number of the first row, and the block."""
    stop = len(keys) if stop is None else stop
    rows = [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
    with ReadAhead(keys, rows) as blocks:
        for number, part in enumerate(rows):
            yield part.start, blocks.block(number)

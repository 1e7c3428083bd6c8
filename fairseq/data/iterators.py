"""Batches epoch by epoch: shuffled by seed and epoch, dealt to ranks, resumable between any two batches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.data.types import LMBatch

logger = logging.getLogger(__name__)
Indices = npt.NDArray[np.int64]


class EpochBatchIterator:
    """Iterator over the batches of an epoch; each step takes one batch for every rank.

    In step s, rank r of W gets the epoch's batch ``s * W + r``, so that W ranks compute the updates of one process
    with ``--update-freq W``. The state counts batches of all ranks: a run may resume with another number of ranks.
    """

    def __init__(
        self,
        collate: Callable[[Indices], LMBatch],
        batches: Sequence[Indices],
        *,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        group: int = 1,
        ordered_epochs: int = 0,
    ) -> None:
        """Iterate over ``batches`` of block numbers.

        Args:
            num_workers: threads that prepare batches ahead; with 0 or 1, each is prepared on demand.
            shuffle: True for another order in every epoch; otherwise the given one.
            group: number of consecutive batches that stay together when shuffled, so that the ranks of a step, if their
                number is a multiple of it, hold whole groups. A last, smaller group stays at the end of the epoch.
            ordered_epochs: number of first epochs that keep the given order even with ``shuffle``.
        """
        assert 0 <= rank < world_size, (rank, world_size)
        assert group >= 1, group
        self.epoch = 1
        self._collate = collate
        self._batches = batches
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._shuffle = shuffle
        self._group = group
        self._ordered_epochs = ordered_epochs
        self._consumed = 0

    def __len__(self) -> int:
        """Steps in an epoch, the same for every rank."""
        return -(-len(self._batches) // self._world_size)

    @property
    def batches_done(self) -> int:
        """Steps of this epoch that are done."""
        return -(-self._consumed // self._world_size)

    @property
    def end_of_epoch(self) -> bool:
        """True if no batch is left in this epoch."""
        return self._consumed >= len(self._batches)

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self._consumed = 0

    def order(self) -> Indices:
        """This epoch's order of the batches."""
        count = len(self._batches)
        if not self._shuffle or self.epoch <= self._ordered_epochs:
            return np.arange(count)
        groups = np.random.default_rng([abs(self._seed), self.epoch]).permutation(count // self._group)
        grouped = (groups[:, None] * self._group + np.arange(self._group)).reshape(-1)
        return np.append(grouped, np.arange(len(grouped), count))

    def __iter__(self) -> Iterator[LMBatch]:
        """This rank's batches from the current position to the end of the epoch.

        A step counts as done as soon as its batch is yielded. A rank without a batch in the last step gets an
        empty one.
        """
        total = len(self._batches)
        own_batches = self.order()[self._consumed :][self._rank :: self._world_size].tolist()
        steps = -(-(total - self._consumed) // self._world_size)
        scheduled = [self._batches[i] for i in own_batches] + [None] * (steps - len(own_batches))
        for batch in self._prefetch(scheduled):
            self._consumed = min(total, self._consumed + self._world_size)
            yield batch

    def _prefetch(self, scheduled: Iterable[Indices | None]) -> Iterator[LMBatch]:
        # A single prefetching thread is slower than none: a batch takes 0.1 ms to make, and waiting for the
        # interpreter's lock three times as long.
        if self._num_workers <= 1:
            yield from map(self._make, scheduled)
            return
        with ThreadPoolExecutor(self._num_workers) as pool:
            ahead: deque[Future[LMBatch]] = deque()
            try:
                for indices in scheduled:
                    ahead.append(pool.submit(self._make, indices))
                    if len(ahead) > 2 * self._num_workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _make(self, indices: Indices | None) -> LMBatch:
        return LMBatch.empty() if indices is None else self._collate(indices)

    def state_dict(self) -> dict[str, int]:
        """Position of the iterator, in plain numbers and independent of the number of ranks."""
        state = {"epoch": self.epoch, "batches_consumed": self._consumed, "num_batches": len(self._batches)}
        return state | ({"group": self._group} if self._group > 1 else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position of another iterator; with another number of batches, the same share of the epoch."""
        self.epoch = int(state["epoch"])
        consumed, saved_num_batches, num_batches = (
            int(state["batches_consumed"]),
            int(state["num_batches"]),
            len(self._batches),
        )
        if saved_num_batches != num_batches and consumed:
            logger.warning(
                "the epoch had %d batches and now has %d (other data or batch size): resuming at the same share of it; "
                "some blocks of this epoch may be seen twice or not at all",
                saved_num_batches,
                num_batches,
            )
            consumed = round(consumed * num_batches / saved_num_batches)
        if (group := int(state.get("group", 1))) != self._group and consumed:
            logger.warning(
                "batches were shuffled %d at a time and are now %d at a time (another number of processes or "
                "--train-mem-size): some blocks of this epoch may be seen twice or not at all",
                group,
                self._group,
            )
        self._consumed = consumed if consumed >= num_batches else consumed - consumed % self._group

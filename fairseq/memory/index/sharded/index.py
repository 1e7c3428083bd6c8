"""The index over all ranges: asks every worker, merges what they found, and asks again where one was lost.

Shapes: N queries, K neighbours, M rows, D width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import as_tensor
from fairseq.memory.index.base import check_k, check_queries
from fairseq.memory.index.ops.merging import best_of
from fairseq.memory.index.sharded.server import RangeFacts
from fairseq.memory.types import Metric, Neighbors
from fairseq.runtime.ray_cluster import WorkerLostError

logger = logging.getLogger(__name__)

# A batch that loses a worker so often is not asked again: then it is not the machine that fails.
ATTEMPTS = 12
_IN_FLIGHT = 2  # batches: workers search one while the one before is merged
_MAX_BATCH_BYTES = 256 << 20
_MAX_BATCH_QUERIES = 4096  # bounds what a lost worker searches again; reading keys once for so many is a small share


class Workers(Protocol):
    """Servers of ranges that run elsewhere, called by number."""

    @property
    def shared_bytes(self) -> int:
        """Memory for queries and results that are under way."""
        ...

    def __len__(self) -> int: ...

    def share(self, value: Any) -> Any:
        """A handle of an argument for several calls, which then travels once."""
        ...

    def send(self, worker: int, method: str, *arguments: Any) -> Any:
        """Begin a call; returns what ``receive`` takes."""
        ...

    def receive(self, call: Any) -> Any:
        """The result of a call. Raises: WorkerLostError when the worker died; what the method raised."""
        ...

    def restart(self, worker: int) -> None:
        """Wait until a lost worker runs again. Raises: WorkerLostError when it does not."""
        ...


class ShardedIndex:
    """An index whose ranges of rows are searched by workers; exact search finds what it finds in one process.

    Scores are those of the rows alone and equals come in row order, so cutting the rows changes no result. A worker
    that dies is started and asked again; one that stays lost raises OSError: there is no smaller answer.
    """

    def __init__(self, workers: Workers, num_rows: int, name: str = "sharded", index_files: Sequence[str] = ()) -> None:
        """Args.

        workers: servers of ranges in the order of rows, which together hold each row once.
        num_rows: rows of the store.
        name: shown in messages.
        index_files: the faiss indexes that are searched, in the order of rows; none for exact search.
        Raises: ValueError when ranges overlap, leave a gap, or differ in width or metric.
        """
        self._workers, self._name, self.index_files = workers, name, tuple(index_files)
        calls = [workers.send(worker, "describe") for worker in range(len(workers))]
        facts = [RangeFacts.of(self._answer(worker, call, "describe")) for worker, call in enumerate(calls)]
        check_ranges(facts, num_rows)
        self._facts: Sequence[RangeFacts] = facts
        self._alive = [each.rows - len(each.deleted) for each in facts]
        self.metric: Metric = facts[0].metric
        self.dim: int = facts[0].dim
        self.deleted = np.concatenate([each.deleted for each in facts])
        self.streams_keys: bool = facts[0].streams_keys
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __str__(self) -> str:
        kind = "exact search" if self.streams_keys else "faiss"
        return f"{self._name}: {kind} of {len(self)} rows by {len(self._workers)} workers"

    def bulk_pays(self, num_queries: int) -> bool:
        """True for more than one query: each search is a message to every worker."""
        return num_queries > 1

    def search(self, query_ND: Tensor, k: int) -> Neighbors:
        """The k closest keys of each query (N, D), best first; with exact search the lower row wins a tie.

        Raises: ValueError if k exceeds the rows that are not deleted, or the width does not fit; OSError when a worker
            is lost for good.
        """
        check_k(k, sum(self._alive))
        asked = {worker: min(k, alive) for worker, alive in enumerate(self._alive) if alive}
        ids_NK = torch.empty(len(query_ND), k, dtype=torch.int64)
        scores_NK = torch.empty(len(query_ND), k)
        row_bytes = 12 * sum(asked.values()) + 4 * self.dim

        def arguments(shared: Any, part: slice, worker: int) -> tuple[Any, ...]:
            return (shared, asked[worker])

        for part, results in self._batches(query_ND, row_bytes, "search", list(asked), arguments):
            pairs = [(as_tensor(ids), as_tensor(scores)) for ids, scores in results]
            ids_NK[part], scores_NK[part] = best_of(pairs, k)
        return Neighbors(ids_NK, scores_NK)

    def score_rows(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Scores of some rows for each query as a search gives them, float32 (N, M); -inf where the id is -1."""
        ids = ids_NM.cpu().numpy()
        scores_NM = torch.full(ids.shape, -torch.inf)
        row_bytes = 12 * len(self._workers) * ids.shape[1] + 4 * self.dim

        def arguments(shared: Any, part: slice, worker: int) -> tuple[Any, ...]:
            return (shared, np.array(ids[part]))

        everyone = range(len(self._workers))
        for part, results in self._batches(query_ND, row_bytes, "score_rows", everyone, arguments):
            for found in results:
                torch.maximum(scores_NM[part], as_tensor(found), out=scores_NM[part])
        return scores_NM

    def _batches(
        self,
        query_ND: Tensor,
        row_bytes: int,
        method: str,
        workers: Sequence[int],
        arguments: Callable[[Any, slice, int], tuple[Any, ...]],
    ) -> Iterator[tuple[slice, list[Any]]]:
        """The workers' results of each batch of queries; a bounded number of batches is under way."""
        check_queries(query_ND, self.dim)
        query = query_ND.detach().float().cpu().contiguous().numpy()
        rows = min(_MAX_BATCH_BYTES, self._workers.shared_bytes // (2 * _IN_FLIGHT)) // row_bytes
        rows = min(rows, _MAX_BATCH_QUERIES)
        if not rows:
            raise ValueError(
                f"the results of one query take {row_bytes} bytes, the cluster's object store has "
                f"{self._workers.shared_bytes}; lower --k, or start Ray with a larger --object-store-memory"
            )
        under_way: deque[tuple[slice, list[tuple[int, Any, tuple[Any, ...]]]]] = deque()

        def finish() -> tuple[slice, list[Any]]:
            part, calls = under_way.popleft()
            return part, [self._answer(worker, call, method, *given) for worker, call, given in calls]

        for start in range(0, len(query), rows):
            if len(under_way) == _IN_FLIGHT:
                yield finish()
            part = slice(start, min(start + rows, len(query)))
            shared = self._workers.share(query[part])
            calls = []
            for worker in workers:
                given = arguments(shared, part, worker)
                calls.append((worker, self._workers.send(worker, method, *given), given))
            under_way.append((part, calls))
        while under_way:
            yield finish()

    def _answer(self, worker: int, call: Any, method: str, *given: Any) -> Any:
        """The result of a call, which is made again while its worker can be restarted."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._workers.receive(call)
            except WorkerLostError as error:
                logger.warning("worker %d of %s was lost (%s); asking again", worker, self._name, error)
                lost: WorkerLostError = error
            if attempt < ATTEMPTS:
                try:
                    self._workers.restart(worker)
                except WorkerLostError as error:
                    lost = error
                    break
                call = self._workers.send(worker, method, *given)
        raise OSError(
            f"worker {worker} of {len(self._workers)} of {self._name} stays lost after {attempt} attempts ({lost}); "
            "its rows cannot be searched: check memory and disks of its node, then run the same command again"
        )


def check_ranges(facts: Sequence[RangeFacts], num_rows: int) -> None:
    """Raise ValueError unless the ranges hold each row of a store once, all of one width and metric."""
    expected = 0
    for number, each in enumerate(facts):
        if each.first_row != expected:
            wrong = "overlaps the one before" if each.first_row < expected else "leaves a gap"
            raise ValueError(
                f"worker {number} begins at row {each.first_row}, the workers before it hold {expected}: it {wrong}; "
                "serve the datastore again"
            )
        for what, first, other in (
            ("width", facts[0].dim, each.dim),
            ("metric", facts[0].metric.value, each.metric.value),
        ):
            if first != other:
                raise ValueError(
                    f"worker 0 has keys of {what} {first}, worker {number} of {other}: they are of different stores; "
                    "serve the datastore again"
                )
        expected += each.rows
    if expected != num_rows:
        raise ValueError(
            f"the workers hold {expected} rows, the datastore {num_rows}: an index was built over another store; "
            "rebuild it"
        )

"""A stand-in for Ray's actors: servers of ranges in this process, which die when a test says so."""

from __future__ import annotations

from typing import Any

from fairseq.memory.index.sharded.server import RangeServer
from fairseq.runtime.ray_cluster import WorkerLostError


class LocalWorkers:
    """Calls run when their result is asked for; what a worker was asked before it died is lost."""

    def __init__(self, ranges, shared_bytes: int = 1 << 30) -> None:
        self.ranges, self.shared_bytes = list(ranges), shared_bytes
        self.lives = [0] * len(self.ranges)
        self.gone: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.under_way = self.most_under_way = 0

    def __len__(self) -> int:
        return len(self.ranges)

    def share(self, value: Any) -> Any:
        return value

    def send(self, worker: int, method: str, *arguments: Any) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return worker, method, arguments

    def receive(self, call: Any) -> Any:
        self.under_way -= 1
        worker, method, arguments = call
        if self.deaths.get(worker):
            self.deaths[worker] -= 1
            raise WorkerLostError("killed")
        return getattr(RangeServer(self.ranges[worker], 1), method)(*arguments)

    def restart(self, worker: int) -> None:
        if worker in self.gone:
            raise WorkerLostError("its node is gone")
        self.lives[worker] += 1

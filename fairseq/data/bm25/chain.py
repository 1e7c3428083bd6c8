"""Lines up all segments so that neighbours in the line are alike (arXiv 2205.12674, sec. 4.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fairseq.data.bm25.results import SegmentNeighbors

Indices = npt.NDArray[np.int64]

# Where the last segment has no neighbour left, one of these many before it may: it will be in the same batch.
_LOOK_BACK = 8


def chain(neighbors: SegmentNeighbors, seed: int) -> Indices:
    """Every segment once: each is followed by its best neighbour that is not in the line yet.

    Then by one that has it as a neighbour; then what follows is looked for among the neighbours of the segments
    before it; and when those have none left either, the chain continues with a segment drawn at random.
    """
    count = len(neighbors)
    if not count:
        return np.empty(0, dtype=np.int64)
    turned = reverse(neighbors)
    free = bytearray(b"\x01") * count
    by_chance = iter(np.random.default_rng(seed).permutation(count).tolist())
    line: list[int] = []
    following: int | None = None
    while len(line) < count:
        if following is None:
            following = next(segment for segment in by_chance if free[segment])
        line.append(following)
        free[following] = 0
        following = _next(line, neighbors, turned, free)
    return np.array(line, dtype=np.int64)


def _next(line: list[int], neighbors: SegmentNeighbors, turned: SegmentNeighbors, free: bytearray) -> int | None:
    for segment in reversed(line[-_LOOK_BACK:]):
        for table in (neighbors, turned):
            for candidate in table.of(segment):
                if free[candidate]:
                    return candidate
    return None


def reverse(neighbors: SegmentNeighbors) -> SegmentNeighbors:
    """For each segment those that have it as a neighbour, the ones that rank it highest first."""
    count = len(neighbors)
    lengths = np.diff(neighbors.starts)
    owners = np.repeat(np.arange(count, dtype=np.int32), lengths)
    ranks = np.arange(len(owners)) - np.repeat(neighbors.starts[:-1], lengths)
    by_rank = np.argsort(ranks, kind="stable")
    order = by_rank[np.argsort(neighbors.ids[by_rank], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(neighbors.ids, minlength=count))])
    return SegmentNeighbors(owners[order], starts.astype(np.int64))


def neighbor_rate(order: Indices, neighbors: SegmentNeighbors) -> float:
    """Share of the pairs next to each other in ``order`` of which one is a retrieved neighbour of the other."""
    if len(order) < 2:
        return 0.0
    line: list[int] = order.tolist()
    alike = sum(b in neighbors.of(a) or a in neighbors.of(b) for a, b in zip(line, line[1:]))
    return alike / (len(line) - 1)

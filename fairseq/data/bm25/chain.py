"""An order of all segments in which adjacent ones are similar (arXiv 2205.12674, sec. 4.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fairseq.data.bm25.results import SegmentNeighbors

Indices = npt.NDArray[np.int64]

# If the last segment has no unused neighbour, one of this many segments before it may: they share a batch.
_LOOK_BACK = 8


def chain(neighbors: SegmentNeighbors, seed: int) -> Indices:
    """Every segment once: each is followed by its best neighbour that is not in the chain yet.

    Without one, it is followed by a segment that has it as a neighbour, then by a neighbour of the segments before it;
    when those have none left either, the chain continues with a segment drawn at random.
    """
    count = len(neighbors)
    if not count:
        return np.empty(0, dtype=np.int64)
    reversed_neighbors = reverse(neighbors)
    unused = bytearray(b"\x01") * count
    shuffled = iter(np.random.default_rng(seed).permutation(count).tolist())
    order: list[int] = []
    successor: int | None = None
    while len(order) < count:
        if successor is None:
            successor = next(segment for segment in shuffled if unused[segment])
        order.append(successor)
        unused[successor] = 0
        successor = _find_successor(order, neighbors, reversed_neighbors, unused)
    return np.array(order, dtype=np.int64)


def _find_successor(
    order: list[int], neighbors: SegmentNeighbors, reversed_neighbors: SegmentNeighbors, unused: bytearray
) -> int | None:
    for segment in reversed(order[-_LOOK_BACK:]):
        for table in (neighbors, reversed_neighbors):
            for candidate in table.of(segment):
                if unused[candidate]:
                    return candidate
    return None


def reverse(neighbors: SegmentNeighbors) -> SegmentNeighbors:
    """For each segment, the segments that have it as a neighbour; those that rank it highest come first."""
    count = len(neighbors)
    lengths = np.diff(neighbors.starts)
    owners = np.repeat(np.arange(count, dtype=np.int32), lengths)
    ranks = np.arange(len(owners)) - np.repeat(neighbors.starts[:-1], lengths)
    by_rank = np.argsort(ranks, kind="stable")
    order = by_rank[np.argsort(neighbors.ids[by_rank], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(neighbors.ids, minlength=count))])
    return SegmentNeighbors(owners[order], starts.astype(np.int64))


def neighbor_rate(order: Indices, neighbors: SegmentNeighbors) -> float:
    """Share of adjacent pairs in ``order`` in which one is a retrieved neighbour of the other."""
    if len(order) < 2:
        return 0.0
    segments: list[int] = order.tolist()
    num_neighbors = sum(b in neighbors.of(a) or a in neighbors.of(b) for a, b in zip(segments, segments[1:]))
    return num_neighbors / (len(segments) - 1)

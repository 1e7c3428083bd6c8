"""Room for the candidates of a query: keys that could still be among its k best."""

from __future__ import annotations

from fairseq.memory.index.ops.kernels import GROUP

CANDIDATE_BYTES = 20
"""Bytes of a candidate: score, row, and the order in which it was scanned, or in exact search a second score."""


def capacity(k: int) -> int:
    """Candidates a query may hold before they are pruned."""
    return max(4 * k, 256) + GROUP

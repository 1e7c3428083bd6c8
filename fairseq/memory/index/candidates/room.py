"""Room for the candidates of a query: keys that could still be among its k best."""

from __future__ import annotations

from fairseq.memory.index.ops.kernels import GROUP

CANDIDATE_BYTES = 20
"""Bytes of a candidate: score, row, and the order in which it was scanned, or in exact search a second score."""


_LEAST = 1024
"""Of few neighbours many keys may be as near as the last: each time that there is no room for them, all are scored."""


def capacity(k: int) -> int:
    """Candidates a query may hold before they are pruned."""
    return max(4 * k, _LEAST) + GROUP

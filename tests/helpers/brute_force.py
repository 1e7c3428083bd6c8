"""What searches are compared with: all similarities, in float64."""

import numpy as np

from fairseq.memory.types import Metric


def similarities(metric: Metric, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(N, M), of N queries and M keys."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric is Metric.L2:
        return -((queries[:, None] - keys[None]) ** 2).sum(-1)
    if metric is Metric.COS:
        queries, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys))
    return queries @ keys.T

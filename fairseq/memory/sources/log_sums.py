"""The sums of a memory's candidates, in one pass over them on a CPU.

Shapes: N positions, M candidates, K neighbours, R rows of a store.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory import scoring
from fairseq.memory.types import Array, Candidates, LogSums, Neighbors
from fairseq.runtime.threads import run_in_threads

_LEAST_PAIRS = 1 << 17  # to start threads takes as long


def log_sums(found: Candidates, target_N: Tensor, temperature: float, before: LogSums | None = None) -> LogSums:
    """As ``scoring.log_sums``, to float32 rounding; by a compiled loop where no gradient is wanted.

    PyTorch's operations pass over the candidates a dozen times, and wake other threads for each.

    Args:
        before: sums of other memories, to which these are added.
    """
    scores_NM = found.scores_NM
    if scores_NM.requires_grad or scores_NM.dtype != torch.float32 or scores_NM.device.type != "cpu":
        return scoring.log_sums(found, target_N, temperature).plus(before)
    from fairseq.memory.sources.log_sum_kernels import add_candidates

    if before is None:
        hit_N, whole_N = (np.full(len(scores_NM), -np.inf, np.float32) for _ in range(2))
    else:
        hit_N, whole_N = before.hit_N.numpy().copy(), before.whole_N.numpy().copy()
    keep_NM = found.keep_NM
    if keep_NM.stride() == (0, 0) and found.keeps_all():  # one permission for all: there is no mask to look at
        keep_NM = keep_NM[:0]
    add_candidates(
        scores_NM.contiguous().numpy(),
        keep_NM.contiguous().numpy(),
        found.values_NM.int().contiguous().numpy(),
        target_N.int().numpy(),
        *for_kernels(temperature),
        hit_N,
        whole_N,
    )
    return LogSums(torch.from_numpy(hit_N), torch.from_numpy(whole_N))


def for_kernels(temperature: float) -> tuple[np.float32, np.float32, np.float32]:
    """Scale, lowest and far, as the kernels of sums take them. Raises: ValueError if temperature <= 0."""
    scoring.check_temperature(temperature)
    return np.float32(1.0 / temperature), np.float32(scoring.LOWEST), np.float32(scoring.FAR)


class RowSums:
    """Collects :func:`log_sums` of search results, whose tokens are looked up in passing."""

    def __init__(self, value_R: Array, target_N: Tensor, temperature: float) -> None:
        """Args.

        value_R: tokens of all rows of the store, int64 or int32, writable (as numba's kernels are declared).
        """
        self._numbers = for_kernels(temperature)
        self._value_R, self._target_N = value_R, target_N.int().numpy()
        self._hit_N, self._whole_N = (np.full(len(target_N), -np.inf, np.float32) for _ in range(2))

    def take(self, numbers: slice | Array, ids_QK: Array, scores_QK: Array) -> None:
        """Add the neighbours of some positions, with the calling thread."""
        from fairseq.memory.sources.log_sum_kernels import add_neighbors

        hit_Q, whole_Q = self._hit_N[numbers], self._whole_N[numbers]
        add_neighbors(scores_QK, ids_QK, self._value_R, self._target_N[numbers], *self._numbers, hit_Q, whole_Q)
        self._hit_N[numbers], self._whole_N[numbers] = hit_Q, whole_Q

    def add(self, first: int, found: Neighbors) -> None:
        """Add the neighbours of positions from one on, with as many threads as pay."""
        scores, ids = found.scores_NK.numpy(), found.ids_NK.numpy()
        step = max(1, -(-len(scores) // torch.get_num_threads()), _LEAST_PAIRS // max(1, scores.shape[1]))
        parts = [slice(at, min(at + step, len(scores))) for at in range(0, len(scores), step)]
        run_in_threads(
            lambda part: self.take(slice(first + part.start, first + part.stop), ids[part], scores[part]), parts
        )

    @property
    def sums(self) -> LogSums:
        """What was collected."""
        return LogSums(torch.from_numpy(self._hit_N), torch.from_numpy(self._whole_N))

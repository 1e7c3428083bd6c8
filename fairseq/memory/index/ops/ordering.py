"""The order of scores, row by row."""

from __future__ import annotations

import numpy as np

from fairseq.memory.types import Array


def argsort_descending(score_NC: Array, k: int | None = None) -> Array:
    """Places of each row's k largest float32 entries (by default all), int64 (N, k).

    The largest come first; of equals the earlier ones first, NaN last.
    """
    # Score and place as one integer, which NumPy sorts with vector instructions: several times faster than floats with
    # their places. A float's bits, with those of a negative one inverted, order as the float does.
    bits_NC = np.ascontiguousarray(score_NC).view(np.int32)
    falling_NC = ~np.where(bits_NC < 0, bits_NC ^ 0x7FFFFFFF, bits_NC)
    falling_NC[np.isnan(score_NC)] = 0x7FFFFFFF
    packed_NC = (falling_NC.astype(np.int64) << 32) | np.arange(score_NC.shape[1])
    if k is not None and k < score_NC.shape[1]:
        packed_NC = np.partition(packed_NC, k - 1, axis=1)[:, :k]
    packed_NC.sort(axis=1)
    places: Array = packed_NC & 0xFFFFFFFF
    return places

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
    if k is not None and k < score_NC.shape[1]:
        packed_NC = _largest(np.ascontiguousarray(score_NC), k)
        if packed_NC is not None:
            packed_NC.sort(axis=1)
            return np.asarray(packed_NC[:, :k] & 0xFFFFFFFF)
    bits_NC = np.ascontiguousarray(score_NC).view(np.int32)
    falling_NC = ~np.where(bits_NC < 0, bits_NC ^ 0x7FFFFFFF, bits_NC)
    falling_NC[np.isnan(score_NC)] = 0x7FFFFFFF
    packed_NC = (falling_NC.astype(np.int64) << 32) | np.arange(score_NC.shape[1])
    if k is not None and k < score_NC.shape[1]:
        packed_NC = np.partition(packed_NC, k - 1, axis=1)[:, :k]
    packed_NC.sort(axis=1)
    places: Array = packed_NC & 0xFFFFFFFF
    return places


def _largest(score_NC: Array, k: int) -> Array | None:
    """The k largest of each row, and few more, packed; None where a row has fewer that are finite."""
    from fairseq.memory.index.ops.kernels import pack_largest

    packed_NC = np.empty(score_NC.shape, np.int64)
    most = pack_largest(score_NC, k, packed_NC)
    return None if most < 0 else np.ascontiguousarray(packed_NC[:, :most])

"""Compiled loops between the keys of a list and 8-bit integers (see ``search.PreparedList`` and ``decoded_lists``).

Shapes: M keys of a list, D width, E columns of the products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import FINITE, compiled


@compiled("(f4[:,::1], f4[::1], b1, f4, i1[:,::1], f4[::1], f4[::1])", fastmath=FINITE)
def round_residuals(
    keys_MD: Any, centroid_D: Any, by_distance: bool, levels: Any, quantized_ME: Any, bias_M: Any, largest: Any
) -> Any:
    """Round keys less their centroid: two passes instead of the ten that tensor operations take.

    Args:
        levels: the largest integer.
        quantized_ME: gets them in its first D columns, in units of the step.
        bias_M: gets minus the squared length of each, or its product with the centroid.
        largest: gets what ``kernels.bound_queries`` wants, but for the largest size of a bias.
    Returns: the step.
    """
    # The largest of each column first: that is vectorized, unlike the search for one largest (a sixth of the time).
    most_D = np.zeros(len(centroid_D), np.float32)
    for m in range(len(keys_MD)):
        key_D = keys_MD[m]
        for d in range(len(centroid_D)):
            most_D[d] = max(most_D[d], abs(key_D[d] - centroid_D[d]))
    most = np.float32(0.0)
    for d in range(len(centroid_D)):
        most = max(most, most_D[d])
    step = max(most, np.float32(1e-30)) / levels
    factor = np.float32(1.0) / step
    longest_quantized, longest, longest_error = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for m in range(len(keys_MD)):
        key_D, quantized_E = keys_MD[m], quantized_ME[m]
        quantized, square, error, product = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for d in range(len(centroid_D)):
            x = key_D[d] - centroid_D[d]
            rounded = np.floor(x * factor + np.float32(0.5))
            quantized_E[d] = np.int8(rounded)
            quantized += rounded * rounded
            square += x * x
            product += x * centroid_D[d]
            difference = x - rounded * step
            error += difference * difference
        bias_M[m] = -square if by_distance else product
        longest_quantized = max(longest_quantized, quantized)
        longest, longest_error = max(longest, square), max(longest_error, error)
    largest[0], largest[1], largest[2] = step * np.sqrt(longest_quantized), np.sqrt(longest), np.sqrt(longest_error)
    return step


@compiled("(u1[:,::1], f4[::1], f4[::1], f4[::1], f4[:,::1])", fastmath={"contract"})
def decode_bytes(codes_MD: Any, least_D: Any, step_D: Any, centroid_D: Any, keys_MD: Any) -> None:
    """Write keys of a byte a column: ``centroid + least + step * byte``."""
    for m in range(len(codes_MD)):
        code_D, key_D = codes_MD[m], keys_MD[m]
        for d in range(len(centroid_D)):
            key_D[d] = centroid_D[d] + (least_D[d] + step_D[d] * np.float32(code_D[d]))

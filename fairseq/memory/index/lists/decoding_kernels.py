"""The compiled loops that decode keys (see ``decoded_lists``).

Import where used: numba takes half a second to load.

Shapes: M keys of a list, S parts of a key, C codewords of a part, W columns of a part, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled


@compiled("(u1[:,::1], f4[::1], f4[::1], f4[::1], f4[:,::1])", fastmath={"contract"})
def decode_bytes(codes_MD: Any, least_D: Any, step_D: Any, centroid_D: Any, keys_MD: Any) -> None:
    """Write keys of a byte a column: ``centroid + least + step * byte``."""
    for m in range(len(codes_MD)):
        code_D, key_D = codes_MD[m], keys_MD[m]
        for d in range(len(centroid_D)):
            key_D[d] = centroid_D[d] + (least_D[d] + step_D[d] * np.float32(code_D[d]))


@compiled("(u1[:,::1], i8[::1], f4[:,:,::1], f4[::1], b1, f4[:,::1])")
def decode_words(codes_MS: Any, at_M: Any, word_SCW: Any, centroid_D: Any, by_residual: bool, keys_MD: Any) -> None:
    """Write the product-quantized keys at some places of a list; those that are residuals plus the centroid."""
    columns = word_SCW.shape[2]
    for m in range(len(at_M)):
        code_S, key_D = codes_MS[np.uint64(at_M[m])], keys_MD[m]
        first = np.uint64(0)
        for s in range(len(word_SCW)):
            word_W = word_SCW[s, np.uint64(code_S[s])]
            for w in range(columns):
                key_D[first + np.uint64(w)] = word_W[w]
            first += np.uint64(columns)
        if by_residual:
            for d in range(len(centroid_D)):
                key_D[d] += centroid_D[d]

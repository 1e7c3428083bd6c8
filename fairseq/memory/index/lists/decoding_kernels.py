"""The compiled loop that decodes keys of a byte a column (see ``decoded_lists``).

Import where used: numba takes half a second to load.

Shapes: M keys of a list, D width.
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

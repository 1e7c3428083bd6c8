"""Arrays within JSON: type, shape and the bytes in base64, so that no digit is lost and a browser maps them."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from fairseq.memory.types import Array

TYPES = ("float32", "int32", "uint8")


def pack(values: Any, dtype: str) -> dict[str, Any]:
    """A packed array, little-endian and row-major.

    ```python
    pack([1.5, 2.0], "float32")  # {"dtype": "float32", "shape": [2], "data": "AADAPwAAAEA="}
    ```
    """
    assert dtype in TYPES, dtype
    array = np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<"))
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> Array:
    """The array of :func:`pack`. Raises: ValueError when type, shape and bytes do not belong together."""
    if packed["dtype"] not in TYPES:
        raise ValueError(f"a packed array is of {packed['dtype']!r}; known: {', '.join(TYPES)}")
    dtype, shape = np.dtype(packed["dtype"]).newbyteorder("<"), tuple(packed["shape"])
    data = base64.b64decode(packed["data"], validate=True)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a packed array of {packed['dtype']} {shape} has {len(data)} bytes; export it again")
    return np.frombuffer(data, dtype).reshape(shape)

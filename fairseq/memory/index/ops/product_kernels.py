"""Products of all rows with all keys, and of those only what may matter, tile by tile (``tile_product_kernels``).

Import where used: numba takes half a second to load.

Shapes: Q rows, M keys (a multiple of 64), E columns.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.tile_product_kernels import INSTRUCTIONS, TILE_KEYS, tile_products


@functools.cache
def multiply(name: str) -> Any:
    """The kernel ``(row_QE, key_B, start_M, out_QM)`` of an instruction set."""
    rows = INSTRUCTIONS[name].rows
    half = rows // 2
    tile, some, single = tile_products(name, rows), tile_products(name, half), tile_products(name, 1)

    def products(row_QE: Any, key_B: Any, start_M: Any, out_QM: Any) -> None:
        count, columns = row_QE.shape
        out_X = np.empty(rows * TILE_KEYS, np.int32)
        for key in range(0, len(start_M), TILE_KEYS):
            first = 0
            while first < count:
                done = rows if first + rows <= count else half if first + half <= count else 1
                if done == rows:
                    tile(row_QE, first, key_B, key * columns, columns, start_M, key, out_X)
                elif done == half:
                    some(row_QE, first, key_B, key * columns, columns, start_M, key, out_X)
                else:
                    single(row_QE, first, key_B, key * columns, columns, start_M, key, out_X)
                for i in range(done):
                    out_QM[first + i, key : key + TILE_KEYS] = out_X[i * TILE_KEYS : (i + 1) * TILE_KEYS]
                first += done

    products.__qualname__ = f"multiply_{name}"
    return compiled("(i1[:,::1], i1[::1], i4[::1], i4[:,::1])")(products)

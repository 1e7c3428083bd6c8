"""Products of all rows with all keys, and of those only what may matter, tile by tile (``tile_product_kernels``).

Import where used: numba takes half a second to load.

Shapes: Q rows, M keys (a multiple of 64), E columns.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.tile_loop_kernels import INSTRUCTIONS, TILE_KEYS, is_matrix
from fairseq.memory.index.ops.tile_product_kernels import tile_products, tile_registers


@functools.cache
def multiply(name: str) -> Any:
    """The kernel ``(row_QE, key_B, start_M, out_QM)`` of an instruction set."""
    rows = INSTRUCTIONS[name].rows
    half = rows // 2
    # Of few rows the registers of a matrix are filled up with others, which must be there.
    fewest = half if is_matrix(name) else 1
    tile, some, single = tile_products(name, rows), tile_products(name, half), tile_products(name, fewest)
    prepare_registers, release_registers = tile_registers(name)

    def products(row_QE: Any, key_B: Any, start_M: Any, out_QM: Any) -> None:
        count, columns = row_QE.shape
        left = count % fewest
        last_RE, last_RX = np.zeros((fewest, columns), np.int8), np.empty((fewest, TILE_KEYS), np.int32)
        last_RE[:left] = row_QE[count - left :]
        prepare_registers()
        for key in range(0, len(start_M), TILE_KEYS):
            first = 0
            while first + fewest <= count:
                done = rows if first + rows <= count else half if first + half <= count else fewest
                out_RX = out_QM[first : first + done, key : key + TILE_KEYS]
                if done == rows:
                    tile(row_QE, first, key_B, key * columns, columns, start_M, key, out_RX)
                elif done == half:
                    some(row_QE, first, key_B, key * columns, columns, start_M, key, out_RX)
                else:
                    single(row_QE, first, key_B, key * columns, columns, start_M, key, out_RX)
                first += done
            if left:
                single(last_RE, 0, key_B, key * columns, columns, start_M, key, last_RX)
                out_QM[first:, key : key + TILE_KEYS] = last_RX[:left]
        release_registers()

    products.__qualname__ = f"multiply_{name}"
    return compiled("(i1[:,::1], i1[::1], i4[::1], i4[:,::1])")(products)

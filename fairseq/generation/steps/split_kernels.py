"""Products of the few rows of a decoding step with a matrix, by parts of bfloat16 (``split_tile_kernels.py``).

Threads share the types. Import this module where it is used.

Shapes: R rows, D width, V types, X numbers of 32 bits, P threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.generation.steps.packed_kernels import fetch_to_write
from fairseq.generation.steps.split_tile_kernels import (
    BLOCK,
    CHUNK,
    NUM_PARTS,
    PARTS,
    SIDE,
    TILE,
    multiply_16,
    multiply_32,
    split_columns,
    transpose,
)
from fairseq.generation.steps.team_kernels import run_in_team, take
from fairseq.memory.index.ops.kernels import compiled
from fairseq.memory.index.ops.numba_library import compiler_features
from fairseq.memory.index.ops.tile_product_kernels import tile_registers

IS_COMPILED = {"amx-bf16", "amx-tile", "avx512f"} <= compiler_features()
"""The compiler has the instructions, without which nothing here can be compiled."""
_SUMS = 4 * TILE
_ROOM = 2 * PARTS + TILE  # parts of two chunks, of which sums take the first when they are done; a transposed register
_LINE = 64
_TURNS = 3  # of each thread at a large matrix: one that is interrupted leaves the rest to others
_LARGE = 200  # blocks; of a small matrix a thread's first block, which nothing has fetched, counts for more
_prepare_registers, _release_registers = tile_registers("amx_int8")


@compiled()
def _aligned(count: int) -> Any:
    """int32 (count,) that begins with a line of the cache."""
    room_X = np.empty(count + _LINE // 4, np.int32)
    first = (-room_X.ctypes.data % _LINE) // 4
    return room_X[first : first + count]


@compiled()
def _split_states(row_RD: Any, room_X: Any, part_X: Any) -> None:
    """Write the parts of all rows, transposed."""
    count, width = row_RD.shape
    chunks, row_X = width // CHUNK, row_RD.reshape(-1)
    for first in range(0, count, SIDE):
        block, tile = first // BLOCK, first % BLOCK // SIDE
        for chunk in range(chunks):
            for n in range(SIDE):
                if first + n < count:
                    split_columns(row_X, (first + n) * width + chunk * CHUNK, room_X, n * SIDE)
                else:
                    for part in range(NUM_PARTS):
                        room_X[part * TILE + n * SIDE : part * TILE + (n + 1) * SIDE] = 0
            at = (block * chunks + chunk) * PARTS + tile * TILE
            for part in range(NUM_PARTS):
                transpose(room_X, part * TILE, part_X, at + 2 * part * TILE)


@compiled()
def _write(room_X: Any, num_types: int, num_rows: int, bias_V: Any, v: int, out_RV: Any, first: int) -> None:
    """Write a block's sums, and the bias, from a row and a type on."""
    sum_X = room_X.view(np.float32)
    for tile in range(4):
        row, column = tile % 2 * SIDE, tile // 2 * SIDE
        if row >= num_rows or column >= num_types:
            continue
        transpose(room_X, tile * TILE, room_X, 2 * PARTS)
        for i in range(min(SIDE, num_rows - row)):
            for j in range(min(SIDE, num_types - column)):
                number = sum_X[2 * PARTS + i * SIDE + j]
                if len(bias_V):
                    number += bias_V[v + column + j]
                out_RV[first + row + i, v + column + j] = number


@compiled()
def _work(weight_VD: Any, bias_V: Any, part_X: Any, room_PX: Any, next_2: Any, turn: int, out_RV: Any) -> None:
    """Multiply blocks of types until there are none left."""
    (num_types, width), count = weight_VD.shape, len(out_RV)
    weight_X, out_X, chunks = weight_VD.reshape(-1), out_RV.reshape(-1), width // CHUNK
    room_X = room_PX[take(next_2, 1, 1)]
    last_X = room_X[_ROOM:].view(np.float32)
    _prepare_registers()
    while True:
        start = take(next_2, 0, turn)
        if start >= num_types:
            break
        for v in range(start, min(start + turn, num_types), BLOCK):
            there, from_X, place = min(BLOCK, num_types - v), weight_X, v * width
            if there < BLOCK:
                last_X[: there * width] = weight_X[place:]
                last_X[there * width :] = np.float32(0.0)
                from_X, place = last_X, 0
            for first in range(0, count, BLOCK):
                for i in range(first, min(first + BLOCK, count)):
                    fetch_to_write(out_X, i * num_types + v)
                part, ahead = first // BLOCK * chunks * PARTS, BLOCK * width if first + BLOCK >= count else 0
                if count - first > SIDE:
                    multiply_32(from_X, place, width, part_X, part, room_X, ahead)
                else:
                    multiply_16(from_X, place, width, part_X, part, room_X, ahead)
                _write(room_X, there, min(BLOCK, count - first), bias_V, v, out_RV, first)
    _release_registers()


def _multiply(row_RD: Any, weight_VD: Any, bias_V: Any, out_RV: Any, team: int, num_threads: int) -> None:
    """Write the products of all rows with all types, plus the bias.

    Args:
        row_RD: of a width that is a multiple of ``CHUNK``.
        bias_V: of each type; of none where there is no bias.
        team: address of OpenMP's ``GOMP_parallel``, for more than one thread.
    """
    (count, width), num_types = row_RD.shape, len(weight_VD)
    blocks = -(-num_types // BLOCK)
    part_X = _aligned(-(-count // BLOCK) * (width // CHUNK) * PARTS)
    size = _ROOM + BLOCK * width
    room_PX = _aligned(num_threads * size).reshape(num_threads, size)
    _split_states(row_RD, room_PX[0], part_X)
    next_2 = np.zeros(2, np.int64)
    if num_threads > 1:
        turns = num_threads * (_TURNS if blocks >= _LARGE else 1)
        turn = -(-blocks // turns) * BLOCK
        run_in_team(_work, team, num_threads, (weight_VD, bias_V, part_X, room_PX, next_2, turn, out_RV))
    else:
        _work(weight_VD, bias_V, part_X, room_PX, next_2, blocks * BLOCK, out_RV)


multiply: Any = None
if IS_COMPILED:
    _multiply.__qualname__ = "multiply"
    multiply = compiled("(f4[:,::1], f4[:,::1], f4[::1], f4[:,::1], i8, i8)")(_multiply)

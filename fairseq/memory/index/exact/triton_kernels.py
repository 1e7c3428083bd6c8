# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, import-not-found"
"""The products of exact search on a GPU, as one Triton kernel: the scores that reach a threshold, never the matrix.

Shapes: N queries, M keys of a block, D width, C candidates a query has room for.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

_BLOCK_N = 64
_BLOCK_M = 128
_BLOCK_D = 32


def collect(
    query_ND: Tensor,
    key_MD: Tensor,
    scale_M: Tensor,
    bias_M: Tensor,
    threshold_N: Tensor,
    first_row: int,
    filled_N: Tensor,
    score_NC: Tensor,
    row_NC: Tensor,
) -> None:
    """Append the keys whose score ``query . key * scale + bias`` reaches the query's threshold, in any order.

    Args:
        query_ND: float32, contiguous like all others.
        key_MD: float32, float16 or bfloat16: half precision is widened in the registers.
        first_row: row of the block's first key.
        filled_N: int32, candidates each query has, raised by those appended; more than C are counted, not written.
        score_NC: float32.
        row_NC: int64.
    Raises: RuntimeError when the kernel cannot be compiled or run.
    """
    (num_queries, width), num_keys = query_ND.shape, len(key_MD)
    if not num_queries or not num_keys:
        return
    block_n = min(_BLOCK_N, max(16, triton.next_power_of_2(num_queries)))
    # Tiles of queries come first: those that run at the same time share their keys in the cache.
    grid = (triton.cdiv(num_queries, block_n), triton.cdiv(num_keys, _BLOCK_M))
    arguments = (query_ND, key_MD, scale_M, bias_M, threshold_N, filled_N, score_NC, row_NC)
    sizes = (num_queries, num_keys, width, score_NC.shape[1], first_row)
    blocks = {"BLOCK_N": block_n, "BLOCK_M": _BLOCK_M, "BLOCK_D": _BLOCK_D}
    try:
        # On the CPU only Triton's interpreter runs it.
        with torch.cuda.device(query_ND.device) if query_ND.is_cuda else nullcontext():
            _collect_tile[grid](*arguments, *sizes, **blocks)
    except TritonError as error:
        raise RuntimeError(f"Triton: {error}") from error


# No annotations below: the compiler would look them up as values.


@triton.jit
def _collect_tile(
    query,
    key,
    scale_M,
    bias_M,
    threshold_N,
    filled_N,
    score_NC,
    row_NC,
    num_queries,
    num_keys,
    width,
    capacity,
    first_row,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries with one tile of keys."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query, is_key = n < num_queries, m < num_keys
    query_row, key_row = query + n.to(tl.int64)[:, None] * width, key + m.to(tl.int64)[:, None] * width
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for left in range(0, width, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        inside = d < width
        query_tile = tl.load(query_row + d[None, :], mask=is_query[:, None] & inside[None, :], other=0.0)
        key_tile = tl.load(key_row + d[None, :], mask=is_key[:, None] & inside[None, :], other=0.0)
        # "ieee": by default the factors would be rounded to TF32's 10 bits, far beyond the slack of the thresholds.
        total = tl.dot(query_tile, tl.trans(key_tile.to(tl.float32)), total, input_precision="ieee")
    scale = tl.load(scale_M + m, mask=is_key, other=0.0)
    bias = tl.load(bias_M + m, mask=is_key, other=0.0)
    threshold = tl.load(threshold_N + n, mask=is_query, other=0.0)
    score = total * scale[None, :] + bias[None, :]
    reaches = is_query[:, None] & is_key[None, :] & (score >= threshold[:, None])
    # One atomic operation for all of a query's candidates of the tile.
    reached = reaches.to(tl.int32)
    count = tl.sum(reached, axis=1)
    start = tl.atomic_add(filled_N + n, count, mask=is_query & (count > 0))
    place = start[:, None] + tl.cumsum(reached, axis=1) - 1
    written = reaches & (place < capacity)
    target = n.to(tl.int64)[:, None] * capacity + place
    row = first_row + m.to(tl.int64)[None, :] + tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int64)
    tl.store(score_NC + target, score, mask=written)
    tl.store(row_NC + target, row, mask=written)

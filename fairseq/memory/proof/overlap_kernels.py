"""The loops of ``overlap.py``, compiled by numba. Import it where it is used.

Shapes: N tokens, G n-grams, H places of a hash table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's part is lost
_MIX = np.uint64(0xD6E8FEB86659FD93)


@compiled()
def _mixed(token: Any) -> Any:
    """A token as 64 bits that look random, so that sums of neighbouring numbers do not coincide."""
    x = (np.uint64(token) + np.uint64(1)) * _MIX
    return x ^ (x >> np.uint64(32))


@compiled("(i8[::1], i8, u8[::1])")
def hash_ngrams(token_N: Any, n: int, hash_G: Any) -> None:
    """Write the hash of the n-gram that begins at each place."""
    power = np.uint64(1)
    for _ in range(n - 1):
        power *= _BASE
    h = np.uint64(0)
    for i in range(len(token_N)):
        if i >= n:
            h -= _mixed(token_N[i - n]) * power
        h = h * _BASE + _mixed(token_N[i])
        if i >= n - 1:
            hash_G[i - n + 1] = h


@compiled("(u8[::1], i8[::1])")
def put(hash_G: Any, table_H: Any) -> None:
    """Enter n-grams into a hash table whose size is a power of 2; an entry is the number of the n-gram plus 1."""
    mask = np.uint64(len(table_H) - 1)
    for g in range(len(hash_G)):
        place = (hash_G[g] >> np.uint64(20)) & mask
        while table_H[place] != 0 and hash_G[table_H[place] - 1] != hash_G[g]:
            place = (place + np.uint64(1)) & mask
        if table_H[place] == 0:
            table_H[place] = g + 1


@compiled("(u8[::1], i8, u8[::1], i8[::1], i8[::1])")
def look_up(row_hash_N: Any, first_row: int, hash_G: Any, table_H: Any, row_G: Any) -> None:
    """Write the first row at which each n-gram of the table begins; rows come in their order, -1 is none so far."""
    mask = np.uint64(len(table_H) - 1)
    for i in range(len(row_hash_N)):
        h = row_hash_N[i]
        place = (h >> np.uint64(20)) & mask
        while table_H[place] != 0:
            g = table_H[place] - 1
            if hash_G[g] == h:
                if row_G[g] < 0:
                    row_G[g] = first_row + i
                break
            place = (place + np.uint64(1)) & mask

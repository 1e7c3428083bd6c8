"""The loops of ``beam_cache.py``, compiled by numba. Import this module where it is used.

Shapes: R rows of texts, T tokens read, N tokens kept, C width of all heads, H heads, P threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.generation.steps.team_kernels import run_in_team, take
from fairseq.memory.index.ops.kernels import FINITE, compiled


@compiled(fastmath=FINITE)
def _score(query_C: Any, key_NC: Any, token_T: Any, scale: Any, share_HT: Any) -> None:
    """Scores of a text's tokens, four at a time: a loop over one head is short."""
    num_heads, num_tokens = share_HT.shape
    width = len(query_C) // num_heads
    for t in range(0, num_tokens, 4):
        last = num_tokens - 1
        a_C, b_C = key_NC[token_T[t]], key_NC[token_T[min(t + 1, last)]]
        c_C, d_C = key_NC[token_T[min(t + 2, last)]], key_NC[token_T[min(t + 3, last)]]
        for h in range(num_heads):
            a = b = c = d = np.float32(0.0)
            for i in range(h * width, (h + 1) * width):
                a += query_C[i] * a_C[i]
                b += query_C[i] * b_C[i]
                c += query_C[i] * c_C[i]
                d += query_C[i] * d_C[i]
            share_HT[h, min(t + 3, last)] = d * scale
            share_HT[h, min(t + 2, last)] = c * scale
            share_HT[h, min(t + 1, last)] = b * scale
            share_HT[h, t] = a * scale


@compiled(fastmath=FINITE)
def _normalize(share_T: Any) -> None:
    """Softmax, in place."""
    largest, total = np.float32(-np.inf), np.float32(0.0)
    for t in range(len(share_T)):
        largest = max(largest, share_T[t])
    for t in range(len(share_T)):
        share_T[t] = np.exp(share_T[t] - largest)
        total += share_T[t]
    for t in range(len(share_T)):
        share_T[t] /= total


@compiled(fastmath=FINITE)
def _mix(value_NC: Any, token_T: Any, share_HT: Any, out_C: Any) -> None:
    """Sum of a text's values by their shares, four at a time."""
    num_heads, num_tokens = share_HT.shape
    width, zero = len(out_C) // num_heads, np.float32(0.0)
    for t in range(0, num_tokens, 4):
        last = num_tokens - 1
        a_C, b_C = value_NC[token_T[t]], value_NC[token_T[min(t + 1, last)]]
        c_C, d_C = value_NC[token_T[min(t + 2, last)]], value_NC[token_T[min(t + 3, last)]]
        for h in range(num_heads):
            a, b = share_HT[h, t], share_HT[h, min(t + 1, last)] if t + 1 <= last else zero
            c = share_HT[h, min(t + 2, last)] if t + 2 <= last else zero
            d = share_HT[h, min(t + 3, last)] if t + 3 <= last else zero
            for i in range(h * width, (h + 1) * width):
                out_C[i] += a * a_C[i] + b * b_C[i] + c * c_C[i] + d * d_C[i]


@compiled(fastmath=FINITE)
def _attend_rows(
    query_RC: Any, key_NC: Any, value_NC: Any, token_RT: Any, share_PHT: Any, next_2: Any, out_RC: Any
) -> None:
    """Attend from rows that no other thread takes."""
    share_HT = share_PHT[take(next_2, 1, 1)]
    scale = np.float32(1.0) / np.sqrt(np.float32(query_RC.shape[1] // len(share_HT)))
    while True:
        r = take(next_2, 0, 1)
        if r >= len(query_RC):
            break
        _score(query_RC[r], key_NC, token_RT[r], scale, share_HT)
        for h in range(len(share_HT)):
            _normalize(share_HT[h])
        out_RC[r] = np.float32(0.0)
        _mix(value_NC, token_RT[r], share_HT, out_RC[r])


@compiled("(f4[:,::1], f4[:,::1], f4[:,::1], i4[:,::1], i8, f4[:,::1], i8, i8)")
def attend(
    query_RC: Any,
    key_NC: Any,
    value_NC: Any,
    token_RT: Any,
    num_heads: int,
    out_RC: Any,
    team: int,
    num_threads: int,
) -> None:
    """Attention of each row's query to the tokens of its text, head by head.

    Args:
        token_RT: which of the tokens kept each row has read.
        team: address of OpenMP's ``GOMP_parallel``, for more than one thread.
    """
    share_PHT = np.empty((num_threads, num_heads, token_RT.shape[1]), np.float32)
    next_2 = np.zeros(2, np.int64)
    if num_threads > 1:
        run_in_team(_attend_rows, team, num_threads, (query_RC, key_NC, value_NC, token_RT, share_PHT, next_2, out_RC))
    else:
        _attend_rows(query_RC, key_NC, value_NC, token_RT, share_PHT, next_2, out_RC)

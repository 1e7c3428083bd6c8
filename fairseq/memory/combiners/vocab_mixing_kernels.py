"""The loop of ``vocab_mixing.py`` on a CPU, compiled by numba. Import it where it is used.

Shapes: C rows, M candidates, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fairseq.memory.index.lists.adc_kernels import LISTS, ROOM
from fairseq.memory.index.lists.byte_search_kernels import BYTE_CODES
from fairseq.memory.index.lists.large_k_kernels import SELECTION_ROOM
from fairseq.memory.index.lists.single_search_kernels import SINGLE_ROOM, single_search
from fairseq.memory.index.ops.kernels import ANY_ORDER, compiled, largest
from fairseq.memory.sources.float_kernels import exp, float_of

NO_TOKEN = -3
"""The index holds rows beyond the tokens that are known."""


@compiled("(i8[:,::1], f4[:,::1], b1[:,::1], f4, f4[::1], f4[::1], f4[:,::1], f4[::1])")
def mix_candidates(
    values_CM: Any, scores_CM: Any, keep_CM: Any, temperature: Any, weight_C: Any, log_left_C: Any,
    logp_CV: Any, mass_V: Any,
) -> int:  # fmt: skip
    """Turn the model's log-probabilities into those of its mixture with candidates, in place.

    Args:
        keep_CM: which candidates count; of no rows where all do. Rows without any stay as they are.
        weight_C: weight of the candidates in each row.
        log_left_C: log of the model's weight.
        mass_V: zeros; they are zeros again afterwards.
    Returns: how many of the tokens do not exist; those are passed over.
    """
    strangers, vocabulary = 0, logp_CV.shape[1]
    share_M = np.empty(scores_CM.shape[1], np.float32)
    for c in range(len(scores_CM)):
        best, total = np.float32(-np.inf), np.float32(0.0)
        for m in range(len(share_M)):
            kept = len(keep_CM) == 0 or keep_CM[c, m]
            share_M[m] = scores_CM[c, m] / temperature if kept else np.float32(-np.inf)
            best = max(best, share_M[m])
        if best == -np.inf:
            continue
        for m in range(len(share_M)):
            share_M[m] = np.exp(share_M[m] - best)
            total += share_M[m]
        for v in range(vocabulary):
            logp_CV[c, v] += log_left_C[c]
        for m in range(len(share_M)):
            if share_M[m] > 0.0:
                if 0 <= values_CM[c, m] < vocabulary:
                    mass_V[values_CM[c, m]] += share_M[m] * (weight_C[c] / total)
                else:
                    strangers += 1
        for m in range(len(share_M)):
            value = values_CM[c, m]
            if share_M[m] > 0.0 and 0 <= value < vocabulary and mass_V[value] > 0.0:  # a token is mixed in once
                ours, theirs = np.log(mass_V[value]), logp_CV[c, value]
                high, low = max(ours, theirs), min(ours, theirs)
                logp_CV[c, value] = high + np.log1p(np.exp(low - high))
                mass_V[value] = 0.0
    return strangers


@compiled(fastmath=ANY_ORDER)
def _sum_of_shares(score_V: Any, top: Any, lowest: Any) -> Any:
    total = np.float32(0.0)
    for v in range(len(score_V)):
        x = score_V[v] - top
        total += exp(lowest if x < lowest else x)  # nan stays nan
    return total


@compiled()
def _normalize(score_V: Any, lowest: Any) -> None:
    """Turn scores into log-probabilities, in place."""
    top = float_of(np.uint32(largest(score_V.view(np.int32))))
    norm = np.log(_sum_of_shares(score_V, top, lowest)) + top
    for v in range(len(score_V)):
        score_V[v] -= norm


@functools.cache
def mix_nearest(name: str) -> Any:
    """The kernel of an instruction set that searches one query's neighbours and mixes them into the model's scores.

    ``(query_1D, lists, codes, by_distance, is_ready_L, room, byte_2MJ, selection_room, single_room, value_R,
    temperature, weight, log_left, lowest, score_1V, mass_V)``: those of ``single_search``, the tokens of all rows, and
    those of :func:`mix_candidates`; a score is taken for at least ``lowest`` less than the largest. Returns: as
    :func:`mix_candidates`, or negative (``NO_TOKEN``, and what ``single_search`` returns), and the scores are as they
    were.
    """
    search = single_search(name)

    def mix(
        query_1D: Any, lists: Any, codes: Any, by_distance: bool, is_ready_L: Any, room: Any, byte_2MJ: Any,
        selection_room: Any, single_room: Any, value_R: Any, temperature: Any, weight: Any, log_left: Any, lowest: Any,
        score_1V: Any, mass_V: Any,
    ) -> Any:  # fmt: skip
        status = search(query_1D, lists, codes, by_distance, is_ready_L, room, byte_2MJ, selection_room, single_room)
        if status < 0:
            return status
        ids_1K, scores_1K = single_room[5], single_room[6]
        for k in range(ids_1K.shape[1]):
            if ids_1K[0, k] >= len(value_R):
                return NO_TOKEN
            ids_1K[0, k] = value_R[ids_1K[0, k]]
        _normalize(score_1V[0], lowest)
        keep = np.empty((0, 0), np.bool_)
        weight_1, log_left_1 = np.full(1, weight, np.float32), np.full(1, log_left, np.float32)
        return mix_candidates(ids_1K, scores_1K, keep, temperature, weight_1, log_left_1, score_1V, mass_V)

    mix.__qualname__ = f"mix_nearest_{name}"
    types = (
        f"f4[:,::1], {LISTS}, {BYTE_CODES}, b1, b1[::1], {ROOM}, u1[:,:,::1], {SELECTION_ROOM}, {SINGLE_ROOM}, "
        "i8[::1], f4, f4, f4, f4, f4[:,::1], f4[::1]"
    )
    return compiled(f"({types})")(mix)

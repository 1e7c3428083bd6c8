"""The loop of ``vocab_mixing.py`` on a CPU, compiled by numba. Import it where it is used.

Shapes: C rows, M candidates, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import compiled


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

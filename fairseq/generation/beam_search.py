"""How beams go on: the best continuations, or drawn ones.

Shapes: S sentences, K rows of each, R = S * K, C candidates of each sentence, V types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Continuations:
    """Candidates for the next step, the best first; a candidate of logp -inf is none."""

    row_SC: Tensor
    """int64 row of the sentence (0 to K - 1) that each continues."""
    token_SC: Tensor
    """int64 its token."""
    total_SC: Tensor
    """Log-probability of the whole text."""


def best_continuations(logp_RV: Tensor, total_SK: Tensor, count: int) -> Continuations:
    """The ``count`` most probable continuations of each sentence, over all of its rows."""
    num_sentences, rows = total_SK.shape
    each = min(count, logp_RV.shape[1])
    # The best of each row first: no sentence takes more of one row than that.
    logp_RC, token_RC = logp_RV.topk(each, dim=1)
    total_SC = (logp_RC.view(num_sentences, rows, each) + total_SK[:, :, None]).flatten(1)
    total_SC, place_SC = total_SC.topk(min(count, rows * each), dim=1)
    token_SC = token_RC.view(num_sentences, -1).gather(1, place_SC)
    return Continuations(torch.div(place_SC, each, rounding_mode="floor"), token_SC, total_SC)


def drawn_continuations(logp_RV: Tensor, total_SK: Tensor, topk: int, topp: float) -> Continuations:
    """One drawn continuation of each row.

    Args:
        topk: draw from so many most probable types; -1 for all.
        topp: draw from the fewest types that hold this share of the probability; -1 for all.
    """
    sorted_RV, types_RV = logp_RV.softmax(1).sort(1, descending=True)
    if topk > 0:
        sorted_RV[:, topk:] = 0
    if topp > 0:
        sorted_RV[sorted_RV.cumsum(1) - sorted_RV >= topp] = 0
    if not bool(sorted_RV[:, 0].isfinite().all()):  # the first is NaN wherever one is
        raise ValueError(
            "the model's scores are no numbers (NaN), so that nothing can be drawn; look at the checkpoint"
        )
    token_R1 = types_RV.gather(1, torch.multinomial(sorted_RV, 1))
    total_SK = total_SK + logp_RV.gather(1, token_R1).view_as(total_SK)
    row_SK = torch.arange(total_SK.shape[1], device=total_SK.device).expand_as(total_SK)
    return Continuations(row_SK, token_R1.view_as(total_SK), total_SK)


def forbid_repeated_ngrams_(logp_RV: Tensor, tokens_RT: Tensor, size: int) -> None:
    """Set tokens that would repeat an n-gram of a row's text to -inf, in place."""
    length = tokens_RT.shape[1]
    if length < size:
        return
    grams_RGN = tokens_RT.unfold(1, size, 1)
    last_RN = tokens_RT[:, length - size + 1 :]
    repeated_RG = (grams_RGN[:, :, : size - 1] == last_RN[:, None]).all(2)
    rows, grams = repeated_RG.nonzero(as_tuple=True)
    logp_RV[rows, grams_RGN[rows, grams, size - 1]] = -torch.inf

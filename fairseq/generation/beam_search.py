"""How beams go on: the best continuations, or drawn ones.

Shapes: S sentences, K rows of each, R = S * K, C candidates of each sentence, V types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LANES = 32


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
    (num_sentences, rows), vocabulary = total_SK.shape, logp_RV.shape[1]
    place_SE = _places_of_best(logp_RV.view(num_sentences, rows, vocabulary), total_SK, count)
    row_SE = torch.div(place_SE, vocabulary, rounding_mode="floor")
    total_SE = logp_RV.view(num_sentences, -1).gather(1, place_SE) + total_SK.gather(1, row_SE)
    total_SC, best_SC = total_SE.topk(min(count, total_SE.shape[1]), dim=1)
    row_SC, place_SC = row_SE.gather(1, best_SC), place_SE.gather(1, best_SC)
    return Continuations(row_SC, place_SC - row_SC * vocabulary, total_SC)


def _places_of_best(logp_SKV: Tensor, total_SK: Tensor, count: int) -> Tensor:
    """Places (row * V + type) among which the ``count`` best of each sentence are, (S, E).

    The best are in the groups of types with the largest maxima. These take one vectorized pass; selecting among the
    groups, and then among the entries of the best ones, takes a third of selecting among all types.
    """
    num_sentences, rows, vocabulary = logp_SKV.shape
    # About as many entries to select from in the second step as in the first. Entries of a group are as many columns
    # apart as there are groups, and with a multiple of 32 groups they are compared 32 at once: a sixth of the time.
    groups = min(vocabulary, -(-math.isqrt(count * vocabulary // rows) // _LANES) * _LANES)
    size = vocabulary // groups
    grouped_SKEG = logp_SKV[:, :, : size * groups].view(num_sentences, rows, size, groups)
    largest_SKG = grouped_SKEG.amax(2) + total_SK[:, :, None]
    best_SC = largest_SKG.flatten(1).topk(min(count, rows * groups), dim=1, sorted=False).indices
    first_SC = torch.div(best_SC, groups, rounding_mode="floor") * vocabulary + best_SC % groups
    within_E = groups * torch.arange(size, device=logp_SKV.device)
    rest_KE = torch.arange(size * groups, vocabulary, device=logp_SKV.device).repeat(rows, 1)  # types of no group
    rest_KE += vocabulary * torch.arange(rows, device=logp_SKV.device)[:, None]
    of_best_SE = (first_SC[:, :, None] + within_E).flatten(1)
    return torch.cat([of_best_SE, rest_KE.flatten().expand(num_sentences, -1)], 1)


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

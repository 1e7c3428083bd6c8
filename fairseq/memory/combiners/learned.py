"""Combiners that a network decides: how much of each position's distribution every neighbour gets.

Whatever the network, the mixture is ``p = share_0 p_model + sum_j share_j [token_j = token]``: a weighting for whole
vocabularies and a combiner for given targets, which read one formula.

Shapes: N positions, M candidates, K neighbours the network reads, C rows of a chunk, V vocabulary, F features.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fairseq.memory.combiners.vocab_mixing import Weights
from fairseq.memory.log_space import log_add
from fairseq.memory.scoring import check_temperature, masked_logsumexp
from fairseq.memory.types import Candidates, LogSums, NeighborFacts


@dataclass(frozen=True)
class Shares:
    """What a mixture is made of; the shares of a position add up to 1."""

    log_share_NM: Tensor
    """Log of each neighbour's share; -inf for those that get none."""
    log_model_N: Tensor
    """Log of the model's share; 0 where nothing was found."""


def mixture_logp(shares: Shares, lm_logp_N: Tensor, is_hit_NM: Tensor) -> Tensor:
    """Log-probability of each target by the mixture, (N,).

    Args:
        lm_logp_N: ln p of the target by the model.
        is_hit_NM: whether the neighbour's token is the target.
    """
    return log_add(lm_logp_N + shares.log_model_N, masked_logsumexp(shares.log_share_NM, is_hit_NM))


class ShareNetwork(nn.Module, ABC):
    """Decides the shares from the neighbours: the part of a combiner that is trained."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Facts that it reads besides tokens and scores: names of fields of ``NeighborFacts``."""

    def __init__(self, k: int, temperature: float) -> None:
        """Args.

        k: neighbours that it reads.
        temperature: divides their scores.
        Raises: ValueError when either is out of range.
        """
        super().__init__()
        if k < 1:
            raise ValueError(f"--k {k}: a learned combiner reads at least 1 neighbour; give it")
        check_temperature(temperature)
        self.k, self.temperature = k, temperature

    def forward(self, found: Candidates) -> Shares:
        """The shares of N positions; those without any neighbour are the model's."""
        count = found.scores_NM.shape[1]
        assert count <= self.k, f"{count} neighbours were given to a combiner of {self.k}"
        padded = padded_to(found, self.k)
        shares = self.shares(padded)
        none_N = ~padded.keep_NM.any(1)
        return Shares(
            shares.log_share_NM.masked_fill(none_N[:, None], -torch.inf)[:, :count],
            shares.log_model_N.masked_fill(none_N, 0.0),
        )

    @abstractmethod
    def shares(self, found: Candidates) -> Shares:
        """The shares of exactly ``k`` neighbours, of which some may be masked; rows without any may hold anything."""
        ...

    def fit_inputs(self, found: Candidates) -> None:
        """Take the scale of the inputs from examples of exactly ``k`` neighbours; called once, before training."""


class Standardized(nn.Module):
    """Inputs less their mean, by their standard deviation: distances of one model are hundreds of those of another."""

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(size))
        self.register_buffer("std_F", torch.ones(size))

    def forward(self, input_NF: Tensor) -> Tensor:
        """The scaled inputs."""
        return (input_NF - self.mean_F) / self.std_F

    def fit(self, input_NF: Tensor) -> None:
        """Take mean and deviation from examples; an input that never changes is left as it is, less its mean."""
        std_F, self.mean_F = input_NF.std(0, unbiased=False), input_NF.mean(0)
        self.std_F = torch.where(std_F > 1e-6 * (1.0 + self.mean_F.abs()), std_F, 1.0)


def distances(found: Candidates) -> Tensor:
    """Minus the scores, (N, K), near to far; a missing neighbour is as far as the last that was found."""
    found_NK = found.scores_NM.masked_fill(~found.keep_NM, -torch.inf)
    last_N1 = (-found_NK).masked_fill(~found.keep_NM, -torch.inf).amax(1, keepdim=True)
    last_N1 = last_N1.masked_fill(torch.isneginf(last_N1), 0.0)
    return torch.where(found.keep_NM, -found_NK, last_N1)


def distinct_counts(found: Candidates) -> Tensor:
    """How many different tokens the first 1, 2, ... K neighbours hold, (N, K), as numbers of the scores' type."""
    values_NK, keep_NK = found.values_NM, found.keep_NM
    earlier_KK = torch.ones(values_NK.shape[1], values_NK.shape[1], dtype=torch.bool, device=values_NK.device).tril(-1)
    same_NKK = (values_NK[:, :, None] == values_NK[:, None]) & keep_NK[:, None] & earlier_KK
    return (keep_NK & ~same_NKK.any(2)).to(found.scores_NM.dtype).cumsum(1)


def padded_to(found: Candidates, k: int) -> Candidates:
    """K neighbours of each position, the missing ones masked; scores that are not finite count as missing."""
    more = k - found.scores_NM.shape[1]
    scores_NK = found.scores_NM if found.scores_NM.is_floating_point() else found.scores_NM.float()
    values_NK = found.values_NM.expand(len(scores_NK), -1).long()
    keep_NK = found.keep_NM & scores_NK.isfinite()
    facts = found.facts
    if more:
        scores_NK, values_NK, keep_NK = (
            nn.functional.pad(x_NK, (0, more), value=value)
            for x_NK, value in ((scores_NK, -torch.inf), (values_NK, -1), (keep_NK, False))
        )
        facts = None if facts is None else _padded_facts(facts, more)
    return Candidates(values_NK, scores_NK.masked_fill(~keep_NK, -torch.inf), keep_NK, None, facts)


def _padded_facts(facts: NeighborFacts, more: int) -> NeighborFacts:
    pads = {
        "key_NMD": (0, 0, 0, more),
        "stored_logp_NM": (0, more),
        "model_logp_NM": (0, more),
        "top_logp_NM": (0, more),
    }
    given = {name: (getattr(facts, name), pad) for name, pad in pads.items()}
    made = {name: None if x is None else nn.functional.pad(x, pad) for name, (x, pad) in given.items()}
    return dataclasses.replace(facts, **made)


@dataclass(frozen=True)
class LearnedWeighting:
    """The shares of a trained network for whole vocabularies: a ``Weighting``."""

    network: ShareNetwork

    @torch.no_grad()
    def __call__(self, norm_C: Tensor, logp_CV: Tensor, found: Candidates) -> Weights:
        """See ``Weighting``: the scores are the logs of the shares, so that their softmax keeps the proportions."""
        shares = self.network(with_model(found, logp_CV, self.network.needs))
        log_model_C = shares.log_model_N.float()
        return Weights(shares.log_share_NM.float(), -torch.expm1(log_model_C), log_model_C)


def with_model(found: Candidates, logp_NV: Tensor, needs: frozenset[str]) -> Candidates:
    """The candidates with the facts about the model's distribution that a network needs."""
    made: dict[str, Tensor] = {}
    if "model_logp_NM" in needs:
        made["model_logp_NM"] = logp_NV.gather(1, found.values_NM.long().clamp_min(0))
    if "top_logp_NM" in needs:
        made["top_logp_NM"] = top_logp(logp_NV, found.scores_NM.shape[1])
    if not made:
        return found
    return dataclasses.replace(found, facts=dataclasses.replace(found.facts or NeighborFacts(), **made))


def top_logp(logp_NV: Tensor, count: int) -> Tensor:
    """The ``count`` largest log-probabilities of each position; a smaller vocabulary's smallest again."""
    top_NM = logp_NV.topk(min(count, logp_NV.shape[1]), dim=1).values
    return torch.cat([top_NM, top_NM[:, -1:].expand(-1, count - top_NM.shape[1])], 1)


@dataclass(frozen=True)
class LearnedCombiner:
    """The shares of a trained network for given targets: a ``Combiner``.

    ```python
    combine = LearnedCombiner(MetaK(k=8, temperature=10.0))
    combine(lm_logp_N, lm_norm_N, memory.lookup(query_ND), target_N)  # log-probabilities, (N,)
    ```
    """

    network: ShareNetwork

    @torch.no_grad()
    def __call__(
        self,
        lm_logp_N: Tensor,
        norm_N: Tensor,
        candidates: Candidates | None,
        target_N: Tensor,
        text_sums: LogSums | None = None,
    ) -> Tensor:
        """Log-probability of each target, (N,). ``norm_N`` belongs to the interface; shares need none."""
        assert text_sums is None, "a learned combiner takes no memories of the text"
        assert candidates is not None, "there is nothing to combine with"
        is_hit_NM = candidates.same_token(target_N) & candidates.keep_NM
        return mixture_logp(self.network(candidates), lm_logp_N, is_hit_NM)

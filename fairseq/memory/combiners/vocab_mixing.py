"""Neighbours mixed into the scores of a whole vocabulary, where they are: nothing of that size is made beside them.

Shapes: R rows of scores, N of them with candidates, C rows of a chunk, M candidates, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.base import check_queries
from fairseq.memory.log_space import log_add
from fairseq.memory.scoring import LOWEST, check_temperature, check_weight, masked_logsumexp
from fairseq.memory.similarity import normalized
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Array, Candidates, Metric

_CHUNK_NUMBERS = 1 << 20  # scores worked on at a time: 4 MB in float32


@dataclass(frozen=True)
class Weights:
    """What each row's mixture is made of."""

    scores_CM: Tensor
    """Scores of the candidates, whose softmax is the memory's distribution."""
    memory_C: Tensor
    """Factor of that distribution."""
    log_model_C: Tensor
    """Log of the factor of the model's distribution."""
    temperature: float = 1.0
    """Divides the scores before the softmax."""


class Weighting(Protocol):
    """Decides how much of each row's distribution the memory gets."""

    def __call__(self, norm_C: Tensor, logp_CV: Tensor, found: Candidates) -> Weights:
        """Weights of rows.

        Args:
            norm_C: log-sum of the model's scores.
            logp_CV: the model's log-probabilities; not to be written to.
            found: the rows' candidates.
        """
        ...


@dataclass(frozen=True)
class FixedWeighting:
    """The same weight everywhere: kNN-LM's (arXiv 1911.00172, eq. 3) and kNN-MT's (arXiv 2010.00710, eq. 3).

    Raises: ValueError when a field is out of range.
    """

    weight: float
    """Share of the candidates, 0 to 1."""
    temperature: float = 1.0
    """Divides their scores."""

    def __post_init__(self) -> None:
        check_weight(self.weight, "--lmbda")
        check_temperature(self.temperature)

    @property
    def log_left(self) -> float:
        """Log of what the model's distribution keeps."""
        return math.log1p(-self.weight) if self.weight < 1.0 else -math.inf

    @functools.cached_property
    def for_kernels(self) -> tuple[np.float32, ...]:
        """Temperature, weight, log of what is left, and the lowest score, as kernels take them."""
        return tuple(np.float32(x) for x in (self.temperature, self.weight, self.log_left, LOWEST))

    def __call__(self, norm_C: Tensor, logp_CV: Tensor, found: Candidates) -> Weights:
        """See ``Weighting``."""
        memory_C, log_model_C = torch.full_like(norm_C, self.weight), torch.full_like(norm_C, self.log_left)
        return Weights(found.scores_NM, memory_C, log_model_C, self.temperature)


@dataclass(frozen=True)
class JointWeighting:
    """Vocabulary and memory normalised together: the memory has its part of both sums (arXiv 2205.12674, sec. 3).

    Scores must be inner products; they are divided by the root of the width.

    Raises: ValueError when the temperature is out of range.
    """

    dim: int
    """Width of the keys."""
    temperature: float = 1.0
    """Divides the scores."""
    adds_up: bool = True
    """False for what TRIME's translation program computed: the memory's distribution is added whole, so that the result
    sums to more than 1."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, norm_C: Tensor, logp_CV: Tensor, found: Candidates) -> Weights:
        """See ``Weighting``."""
        scale = self.temperature * self.dim**0.5
        scores_CM = found.scores_NM.float() / scale
        excess_C = masked_logsumexp(scores_CM, found.keep_NM) - norm_C
        memory_C = torch.sigmoid(excess_C) if self.adds_up else torch.ones_like(excess_C)
        return Weights(scores_CM, memory_C, torch.nn.functional.logsigmoid(-excess_C))


class VocabularyMixer:
    """``log((1 - weight) p_lm + weight p_memory)`` for every token of the vocabulary, in place: what generation needs.

    Holds one chunk's worth of memory between calls, whatever the vocabulary.

    Source: arXiv 1911.00172, eq. 3.

    ```python
    scores_NV = lm_logits_NV.clone()
    VocabularyMixer(weight=0.25).mix_(scores_NV, None, memory.lookup(query_ND))
    torch.testing.assert_close(scores_NV.logsumexp(1), torch.zeros(3))  # they are log-probabilities now
    ```
    """

    def __init__(self, weight: float | Weighting, temperature: float = 1.0) -> None:
        """Args.

        weight: share of the candidates, 0 to 1, or what decides about it.
        temperature: divides their scores, where the weight is a number.
        Raises: ValueError when either is out of range.
        """
        self.weighting = FixedWeighting(weight, temperature) if isinstance(weight, (int, float)) else weight
        self._mass_CV: Tensor | None = None

    @property
    def is_off(self) -> bool:
        """True if the memory has no weight anywhere."""
        return isinstance(self.weighting, FixedWeighting) and self.weighting.weight == 0.0

    def normalize_(self, scores_RV: Tensor, rows_N: Tensor | None = None) -> None:
        """Turn some rows of scores (by default all) into log-probabilities, in place."""
        for chosen in _chunks(scores_RV, rows_N):
            scores_RV[chosen] = torch.log_softmax(scores_RV[chosen].float(), dim=1).to(scores_RV.dtype)

    def mix_(
        self, scores_RV: Tensor, rows_N: Tensor | None, found: Candidates, target_N: Tensor | None = None
    ) -> Tensor | None:
        """Turn some rows of scores into the mixture's log-probabilities, in place; the others stay as they are.

        A row that may use none of its candidates becomes the language model's log-probabilities.

        Args:
            scores_RV: the language model's scores, before or after a softmax; any floating type.
            rows_N: numbers of the rows; None for all.
            found: their candidates, for N rows.
            target_N: a token of each of these rows.
        Returns: the log-probabilities of ``target_N`` in float32, (N,), whatever type the scores have.
        Source: arXiv 1911.00172, eq. 3.
        """
        logp, done, keeps_all = [], 0, found.keeps_all()
        for chosen in _chunks(scores_RV, rows_N):
            logp_CV = scores_RV[chosen].float()  # a slice of rows in float32 is worked on where it is
            part = slice(done, done + len(logp_CV))
            done = part.stop
            self._mix_chunk_(logp_CV, found.rows(part), keeps_all)
            if target_N is not None:
                logp.append(logp_CV.gather(1, target_N[part, None])[:, 0])
            if rows_N is not None or scores_RV.dtype is not torch.float32:
                scores_RV[chosen] = logp_CV.to(scores_RV.dtype)
        if target_N is None:
            return None
        return torch.cat(logp) if logp else scores_RV.new_empty(0, dtype=torch.float32)

    def mix_nearest_(self, scores_1V: Tensor, query_1D: Tensor, memory: ExternalMemory) -> bool:
        """Look up one row's candidates and mix them in, in place, by one compiled call.

        As ``mix_(scores_1V, None, memory.lookup(query_1D))`` to float32 rounding. That is fifty small operations, each
        after a model that has filled the caches: 1.0 ms of the 1.6 that they took in a step of generation.

        Returns: False where this is not possible; the scores are then as they were.
        Raises: ValueError for a query of another width than the index, and for tokens beyond the vocabulary.
        """
        weighting, one = self.weighting, memory.search_of_one()
        if one is None or not isinstance(weighting, FixedWeighting):
            return False
        if not scores_1V.is_cpu or scores_1V.dtype is not torch.float32:
            return False
        scores, query = scores_1V.numpy(), _as_query(query_1D, memory.index.metric)
        if query.ndim != 2 or query.shape[1] != one.dim:
            check_queries(query_1D, one.dim)
        if not len(scores) == len(query) == 1 or not scores.flags.c_contiguous:
            return False
        kernel, unprepared = _nearest_kernel(one.search.bytes)
        rooms = one.search.rooms()
        room = rooms.take()
        given = (query, *room.arguments(one.search, memory.k), one.value_R, *weighting.for_kernels)
        strangers = kernel(*given, scores, room.zeros(scores.shape[1]))
        if strangers == unprepared:
            one.search.prepare_nearest(query)
            strangers = kernel(*given, scores, room.zeros(scores.shape[1]))
        rooms.put(room)
        if strangers > 0:
            _check_strangers(strangers, scores.shape[1])
        return bool(strangers == 0)

    def _mix_chunk_(self, logp_CV: Tensor, found: Candidates, keeps_all: bool) -> None:
        values_CM, keep_CM = found.values_NM, None if keeps_all else found.keep_NM
        if not values_CM.shape[1]:
            logp_CV.copy_(torch.log_softmax(logp_CV, dim=1))  # as models compute it
            return
        empty_E = None if keep_CM is None else (~keep_CM.any(1)).nonzero()[:, 0]
        # As models compute it, so that their bits remain where nothing is found; elsewhere the log-sum, which is more
        # exact where the vocabulary is wide (findings/torch-softmax-loses-mass-on-wide-vocabularies.sh).
        kept = None if empty_E is None or not len(empty_E) else torch.log_softmax(logp_CV[empty_E], dim=1)
        norm_C1 = torch.logsumexp(logp_CV, dim=1, keepdim=True)
        logp_CV -= norm_C1
        weights = self.weighting(norm_C1[:, 0], logp_CV, found)
        if logp_CV.device.type == "cpu" and logp_CV.is_contiguous():
            self._mix_on_cpu_(logp_CV, values_CM, keep_CM, weights)
        else:
            self._mix_anywhere_(logp_CV, values_CM, keep_CM, weights)
        if kept is not None:
            logp_CV[empty_E] = kept

    def _mix_anywhere_(self, logp_CV: Tensor, values_CM: Tensor, keep_CM: Tensor | None, weights: Weights) -> None:
        """Mix candidates into log-probabilities by torch, on any device."""
        scores_CM = weights.scores_CM / weights.temperature
        if keep_CM is not None:
            scores_CM.masked_fill_(~keep_CM, -torch.inf)
            values_CM = values_CM.masked_fill(~keep_CM, 0)
        best_C1 = scores_CM.amax(1, keepdim=True)
        logp_CV += torch.where(torch.isneginf(best_C1), 0.0, weights.log_model_C[:, None])
        share_CM = scores_CM.sub_(best_C1.clamp_(min=torch.finfo(scores_CM.dtype).min)).exp_()
        share_CM *= weights.memory_C[:, None] / share_CM.sum(1, keepdim=True).clamp_min(1e-30)
        mass_CV = self._zeros(logp_CV)
        mass_CV.scatter_add_(1, values_CM, share_CM)
        # All candidates of a token read the same sum and write the same result, so that their order means nothing.
        mixed_CM = log_add(logp_CV.gather(1, values_CM), mass_CV.gather(1, values_CM).log_())
        logp_CV.scatter_(1, values_CM, mixed_CM)
        mass_CV.scatter_(1, values_CM, 0.0)

    def _mix_on_cpu_(self, logp_CV: Tensor, values_CM: Tensor, keep_CM: Tensor | None, weights: Weights) -> None:
        """The same in one compiled loop: for one row, as generation has it, many operations take several times as long.

        Raises: ValueError for candidates beyond the vocabulary.
        """
        from fairseq.memory.combiners.vocab_mixing_kernels import mix_candidates

        keep = np.empty((0, 0), np.bool_) if keep_CM is None else keep_CM.contiguous().numpy()
        scores_CM = weights.scores_CM.float().contiguous()
        values = values_CM.expand(len(scores_CM), -1).contiguous().numpy()
        each_C = (weights.memory_C.float().numpy(), weights.log_model_C.float().numpy())
        strangers = mix_candidates(
            values,
            scores_CM.numpy(),
            keep,
            np.float32(weights.temperature),
            *each_C,
            logp_CV.numpy(),
            self._zeros(logp_CV[0]).numpy(),
        )
        _check_strangers(strangers, logp_CV.shape[1])

    def _zeros(self, like_CV: Tensor) -> Tensor:
        """Zeros in the shape of a chunk; whoever uses them leaves them zero."""
        held = self._mass_CV
        count = like_CV.numel()
        if held is None or len(held) < count or held.device != like_CV.device:
            held = self._mass_CV = torch.zeros(count, device=like_CV.device)
        return held[:count].view(like_CV.shape)


def _as_query(query_1D: Tensor, metric: Metric) -> Array:
    """A query as kernels take it."""
    if query_1D.requires_grad or not query_1D.is_cpu or query_1D.dtype is not torch.float32:
        query_1D = query_1D.detach().float().cpu()
    query: Array = (normalized(query_1D) if metric is Metric.COS else query_1D).numpy()
    return query if query.flags.c_contiguous else np.ascontiguousarray(query)


@functools.cache
def _nearest_kernel(name: str) -> tuple[Any, int]:
    """The kernel of an instruction set, and what it returns for lists that are to be prepared."""
    from fairseq.memory.combiners.vocab_mixing_kernels import mix_nearest
    from fairseq.memory.index.lists.single_search_kernels import UNPREPARED

    return mix_nearest(name), UNPREPARED


def _check_strangers(strangers: int, vocabulary: int) -> None:
    if strangers:
        raise ValueError(
            f"{strangers} neighbours hold tokens beyond the vocabulary of {vocabulary}; the datastore is of another "
            "one; save it again with this model"
        )


def _chunks(scores_RV: Tensor, rows_N: Tensor | None) -> Iterator[slice | Tensor]:
    """Some rows (by default all) in groups of a bounded number of scores."""
    step = max(1, _CHUNK_NUMBERS // max(1, scores_RV.shape[1]))
    if rows_N is not None:
        yield from torch.split(rows_N, step)
    else:
        yield from (slice(start, min(start + step, len(scores_RV))) for start in range(0, len(scores_RV), step))

"""Memories mixed into the scores of sequences that each have a store, a weight, a k and a temperature of their own.

Shapes: B sequences, M candidates, V vocabulary, D width of the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq.hf.hooks.names import KeyType
from fairseq.memory.combiners.vocab_mixing import FixedWeighting, VocabularyMixer
from fairseq.memory.retomaton.automaton import Retomaton, RetomatonState, RetomatonStep
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Candidates


@dataclass(frozen=True)
class OpenMemory:
    """A store as it is now, open for searches. It never changes; what changes the store makes another one."""

    external: ExternalMemory
    kind: KeyType
    """Place of the keys in the model."""
    automaton: Retomaton | None = None
    """Follows pointers, where RetoMaton is asked for."""

    def with_k(self, k: int) -> ExternalMemory:
        """The same store and index for another number of neighbours."""
        if k == self.external.k:
            return self.external
        return ExternalMemory(self.external.store, self.external.index, k, self.external.score)

    def automaton_of(self, k: int) -> Retomaton | None:
        """The automaton whose searches find ``k`` neighbours; its tables are shared."""
        if self.automaton is None or k == self.external.k:
            return self.automaton
        other = copy.copy(self.automaton)
        other.external = self.with_k(k)
        return other


@dataclass(frozen=True)
class KnnSettings:
    """Options of one sequence."""

    weight: float
    """Share of the neighbours in the probability, 0 to 1."""
    k: int
    """Neighbours of a search."""
    temperature: float
    """Divides their scores."""


@dataclass
class RowMemory:
    """The memory of one sequence, and the pointers it follows."""

    memory: OpenMemory
    settings: KnnSettings
    step: RetomatonStep | None = field(default=None)
    """RetoMaton's last step; None before the first, which is a search."""

    def update(self, memory: OpenMemory) -> None:
        """Read the store as it is now; pointers into an earlier one are dropped."""
        if memory is not self.memory:
            self.memory, self.step = memory, None


@dataclass(frozen=True)
class Found:
    """The candidates of one sequence at one position."""

    rows_M: Tensor
    """int64 rows of the store, the closest first."""
    tokens_M: Tensor
    """int64: the tokens that came next there."""
    scores_M: Tensor
    """float32, higher is closer."""
    weights_M: Tensor
    """float32: shares in the distribution of the memory, which sum to 1 over all candidates."""

    @classmethod
    def of(cls, candidates: Candidates, row: int, rows_M: Tensor, temperature: float) -> Found:
        """Those of one position."""
        keep_M = candidates.keep_NM[row].cpu()
        scores_M = candidates.scores_NM[row].cpu().float()[keep_M]
        order_M = scores_M.argsort(descending=True, stable=True)
        values_M = candidates.values_NM.expand(candidates.scores_NM.shape)[row].cpu()[keep_M]
        weights_M = torch.softmax(scores_M / temperature, 0)
        return cls(rows_M.cpu()[keep_M][order_M], values_M[order_M].long(), scores_M[order_M], weights_M[order_M])

    def __len__(self) -> int:
        return len(self.rows_M)

    def first(self, count: int) -> Found:
        """The closest ones."""
        return Found(self.rows_M[:count], self.tokens_M[:count], self.scores_M[:count], self.weights_M[:count])


class RowMixer:
    """Mixes the memory of each sequence into its scores, in place: what ``KNNWrapper`` and ``RetomatonWrapper`` do for
    one setting."""

    def __init__(self) -> None:
        self._mixer = VocabularyMixer(0.0)
        self.num_lookups = self.num_searches = 0
        """Positions that were looked up, and those of them that needed a search."""

    def mix_(
        self,
        scores_BV: Tensor,
        keys: Mapping[KeyType, Tensor],
        memories: Sequence[RowMemory | None],
        tokens: Sequence[int | None],
        wanted: Sequence[bool],
    ) -> list[Found | None]:
        """Turn the scores of the sequences that have a memory into log-probabilities of the mixture.

        Args:
            keys: of each kind, (B, D).
            memories: of each sequence; None for the model alone, whose scores stay as they are.
            tokens: that were read since the last step, which RetoMaton follows; None for a sequence that begins.
            wanted: whether the candidates of a sequence are to be returned.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, memory in enumerate(memories):
            if memory is not None and memory.settings.weight > 0.0:
                groups.setdefault((id(memory.memory), memory.settings.k), []).append(row)
        found: list[Found | None] = [None] * len(memories)
        for rows in groups.values():
            mine = [memory for row in rows if (memory := memories[row]) is not None]
            key_ND = keys[mine[0].memory.kind][rows]
            candidates, rows_NM = self._look_up(key_ND, mine, [tokens[row] for row in rows])
            self._mix_group_(scores_BV, rows, mine, candidates)
            for n, row in enumerate(rows):
                if wanted[row]:
                    found[row] = Found.of(candidates, n, rows_NM[n], mine[n].settings.temperature)
        return found

    def _look_up(
        self, key_ND: Tensor, memories: Sequence[RowMemory], tokens: Sequence[int | None]
    ) -> tuple[Candidates, Tensor]:
        memory, k = memories[0].memory, memories[0].settings.k
        automaton = memory.automaton_of(k)
        self.num_lookups += len(memories)
        if automaton is None:
            self.num_searches += len(memories)
            external = memory.with_k(k)
            # Not its lookup, which logs a line: here that would be one for every token.
            candidates = external.candidates(external.neighbors(key_ND), key_ND.device)
            assert candidates.rows_NM is not None
            return candidates, candidates.rows_NM
        states = []
        for each, token in zip(memories, tokens):
            begins = each.step is None or token is None
            states.append(
                RetomatonState.empty(1) if begins else automaton.follow(each.step, torch.tensor([token]))  # type: ignore[arg-type]
            )
        step = automaton.lookup(key_ND, RetomatonState.joined(states))
        for n, each in enumerate(memories):
            each.step = step.select(torch.tensor([n]))
        self.num_searches += int(step.searched_B.sum())
        return step.found, step.rows_BM

    def _mix_group_(
        self, scores_BV: Tensor, rows: Sequence[int], memories: Sequence[RowMemory], candidates: Candidates
    ) -> None:
        alike: dict[tuple[float, float], list[int]] = {}
        for n, memory in enumerate(memories):
            alike.setdefault((memory.settings.weight, memory.settings.temperature), []).append(n)
        for (weight, temperature), members in alike.items():
            self._mixer.weighting = FixedWeighting(weight, temperature)
            some = candidates if len(members) == len(rows) else candidates.rows(torch.tensor(members))
            rows_N = torch.tensor([rows[n] for n in members], device=scores_BV.device)
            whole = len(members) == len(scores_BV)  # all of them, in their order, are mixed where they are
            self._mixer.mix_(scores_BV, None if whole else rows_N, some)

"""Reading text that is given with RetoMaton: all sequences side by side, one position of each at a time.

Shapes: B sequences, N positions of all of them, D key width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.memory.combiners.base import Combiner
from fairseq.memory.retomaton.automaton import Found, Retomaton, RetomatonState, RetomatonStep
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.memory.retomaton.foreign_clusters import open_clusters
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Candidates, Neighbors, ScoredPositions

logger = logging.getLogger(__name__)

_MAX_SEQUENCES = 512  # that are read side by side: what a step holds is bounded by this
_AHEAD_BYTES = 1 << 30  # of neighbours that were searched before their turn

Use = Callable[[Tensor, Candidates], None]
Keep = Callable[[Tensor, RetomatonStep], None]


@dataclass(frozen=True)
class ReadText:
    """Result of reading some text."""

    state: RetomatonState
    """Of each sequence, after its last token."""
    num_searched: int
    """Positions at which the automaton needed a search."""


def read_text(
    memory: Retomaton,
    query_ND: Tensor,
    token_N: Tensor,
    lengths_B: Tensor,
    use: Use,
    state: RetomatonState | None = None,
    *,
    ahead: bool = False,
    keep: Keep | None = None,
) -> ReadText:
    """Look up every position of some sequences; a position sees what comes after it in no way.

    Args:
        query_ND: keys of the positions, sequence after sequence.
        token_N: the token that comes after each; followed once its position has been looked up.
        lengths_B: positions of each sequence.
        use: is called with some positions (their numbers among the N) and their candidates; one position of each
            sequence at a time.
        state: what the sequences have read before; by default nothing.
        ahead: search all positions before the first step, which costs less where an index answers many queries at once
            much faster than a few. Which searches the automaton needed is counted all the same.
        keep: is called with the same positions and their steps, from which a reader may follow another token later.
    """
    state = memory.start(len(lengths_B)) if state is None else state
    starts_B = lengths_B.cumsum(0) - lengths_B
    states, num_searched = [], 0
    for group in side_by_side(lengths_B, memory.external.k if ahead else 0):
        # The longest first: those that continue at a step are then the first ones.
        group = group[lengths_B[group].argsort(descending=True, stable=True)]
        places = Places(query_ND, token_N, starts_B[group], lengths_B[group])
        known = places.neighbors(memory) if ahead and len(group) else None
        done = _read_group(memory, places, use, state.select(group), known, keep)
        back = group - group.min()
        states.append(done.state.select(back.argsort()))
        num_searched += done.num_searched
    return ReadText(RetomatonState.joined(states), num_searched)


def side_by_side(lengths_B: Tensor, k: int) -> list[Tensor]:
    """Numbers of the sequences that are read side by side; ``k`` neighbours of each position are held, or none."""
    group_B = torch.arange(len(lengths_B)) // _MAX_SEQUENCES
    if k:
        held_B = (lengths_B.cumsum(0) - 1).clamp(min=0)
        group_B = torch.maximum(group_B, held_B // max(1, _AHEAD_BYTES // (12 * k)))
    sizes = torch.unique_consecutive(group_B, return_counts=True)[1]
    return list(torch.split(torch.arange(len(lengths_B)), sizes.tolist()))


@dataclass(frozen=True)
class Places:
    """Sequences that are read side by side, the longest first."""

    query_ND: Tensor
    token_N: Tensor
    starts_B: Tensor
    lengths_B: Tensor

    def neighbors(self, memory: Retomaton) -> tuple[Neighbors, Tensor]:
        """Neighbours of all positions, and the row of them for each of the N positions."""
        runs = [
            torch.arange(first, first + size) for first, size in zip(self.starts_B.tolist(), self.lengths_B.tolist())
        ]
        place_M = torch.cat(runs)
        at_N = torch.full((len(self.query_ND),), -1)
        at_N[place_M] = torch.arange(len(place_M))
        return memory.external.neighbors(self.query_ND[place_M.to(self.query_ND.device)]), at_N


def _read_group(
    memory: Retomaton,
    places: Places,
    use: Use,
    state: RetomatonState,
    known: tuple[Neighbors, Tensor] | None,
    keep: Keep | None,
) -> ReadText:
    ended: list[RetomatonState] = []
    num_searched = 0
    for t in range(int(places.lengths_B.max()) if len(state) else 0):
        going = int((places.lengths_B > t).sum())
        if going < len(state):
            ended.append(state.select(torch.arange(going, len(state))))
            state = state.select(torch.arange(going))
        place_B = places.starts_B[:going] + t
        found = None if known is None else _found_at(known[0], known[1][place_B])
        step = memory.lookup(places.query_ND[place_B.to(places.query_ND.device)], state, found)
        use(place_B, step.found)
        if keep is not None:
            keep(place_B, step)
        num_searched += int(step.searched_B.sum())
        state = memory.follow(step, places.token_N[place_B.to(places.token_N.device)])
    return ReadText(RetomatonState.joined([state, *ended[::-1]]), num_searched)


def _found_at(neighbors: Neighbors, at_B: Tensor) -> Found:
    """Gives neighbours of those positions at which a search is needed."""

    def found(searched_B: Tensor) -> Neighbors:
        rows = at_B[searched_B]
        return Neighbors(neighbors.ids_NK[rows], neighbors.scores_NK[rows])

    return found


class RetomatonReader:
    """Scores the blocks of a text with RetoMaton, each as a sequence of its own, and counts the searches."""

    needs_keys = True
    reads_alone = False

    def __init__(self, memory: Retomaton, combine: Combiner, *, ahead: bool = False, carry: bool = False) -> None:
        """Args.

        combine: mixes the candidates into the model's scores.
        ahead: as in ``read_text``.
        carry: keep the active pointers from one block of the text to the next; blocks must then come in its order.
        """
        self.memory, self.combine, self.ahead, self.carry = memory, combine, ahead, carry
        self.num_positions = self.num_searched = 0
        self.record: Callable[[ScoredPositions, Candidates], None] | None = None
        self.record_step: Keep | None = None
        """Is given some of the positions that are read, by their numbers among them, and their steps."""
        self._last_block: int | None = None
        self._state = memory.start(1)

    def with_record(self, record: Callable[[ScoredPositions, Candidates], None]) -> RetomatonReader:
        """A reader that goes on from here by itself, and whose candidates are recorded."""
        other = copy.copy(self)
        other.record = record
        return other

    def logp(self, scored: ScoredPositions) -> Tensor:
        """See ``MemoryReader``; all scored positions of a block stand one after the other, in their order."""
        target_N, logp_N, norm_N, key_ND = scored.target_N, scored.logp_N, scored.norm_N, scored.keys
        out_N = torch.empty_like(logp_N)

        def use(place_B: Tensor, candidates: Candidates) -> None:
            at_B = place_B.to(logp_N.device)
            if self.record is not None:
                self.record(scored.rows(at_B), candidates)
            out_N[at_B] = self.combine(logp_N[at_B], norm_N[at_B], candidates, target_N[at_B]).to(out_N.dtype)

        block_B, lengths_B = torch.unique_consecutive(scored.block_N.cpu(), return_counts=True)
        state = self.memory.start(len(block_B))
        if self.carry and len(block_B):
            follows_B = block_B.diff() == 1
            texts_B = torch.cat([torch.zeros(1, dtype=torch.int64), (~follows_B).cumsum(0)])
            lengths_B = torch.bincount(texts_B, weights=lengths_B.double()).long()
            first = self._state if self._last_block == int(block_B[0]) - 1 else self.memory.start(1)
            state = RetomatonState.joined([first, self.memory.start(len(lengths_B) - 1)])
            self._last_block = int(block_B[-1])
        done = read_text(self.memory, key_ND, target_N, lengths_B, use, state, ahead=self.ahead, keep=self.record_step)
        if self.carry and len(lengths_B):
            self._state = done.state.select(torch.tensor([len(lengths_B) - 1]))
        self.num_positions += len(scored)
        self.num_searched += done.num_searched
        return out_N


def open_reader(config: RetomatonConfig, external: ExternalMemory, combine: Combiner) -> RetomatonReader:
    """The reader that a config describes, over an opened store.

    Raises: ValueError when the clusters are not of the store.
    """
    clusters = open_clusters(config.clusters, external.store) if config.clusters else None
    memory = Retomaton(
        external,
        min_knns=config.min_knns,
        max_knns=config.max_knns,
        no_pointer=config.no_pointer,
        clusters=clusters,
    )
    ahead = config.retomaton_search == "ahead"
    if config.retomaton_search == "auto":  # the keys stream by once, for however many queries
        ahead = external.index.streams_keys
    if clusters is not None:
        logger.info("%d clusters: %s", len(clusters), config.clusters)
    return RetomatonReader(memory, combine, ahead=ahead, carry=config.retomaton_carry)

"""RetoMaton: neighbours by following pointers to the next rows, searched only where too few are left.

The row after row i of a datastore is i + 1: the next token of the text the store was made of. Of the candidates of one
step those that hold the token which came next in the text being read lead on: the rows after them, and all rows in the
same clusters as these, are the active pointers of the next step. Where enough pointers are active no search is made.

Source: arXiv 2201.12431, sec. 3.

Shapes: B sequences, P active pointers, K neighbours of a search, M candidates of a step, N positions, D key width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.retomaton.clusters import Clusters
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Array, Candidates, Neighbors

Found = Callable[[Tensor], Neighbors]

# The types that small clusters have, so that nothing is compiled once more for none.
_NO_TOKENS = np.empty(0, np.int64)
_NO_CLUSTERS = (np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32))


@dataclass(frozen=True)
class RetomatonState:
    """State of each of B sequences in the automaton; an immutable value."""

    rows_BP: Tensor
    """int64 active pointers for the next step, the most promising first, then -1; on the host."""
    reached_B: Tensor | None = None
    """int64 pointers that decide whether a search is needed, where these are not all of ``rows_BP`` (``compat``)."""

    @property
    def num_pointers(self) -> Tensor:
        """int64 pointers of each sequence that save a search, (B,)."""
        return (self.rows_BP >= 0).sum(1) if self.reached_B is None else self.reached_B

    def __len__(self) -> int:
        return len(self.rows_BP)

    @classmethod
    def empty(cls, num_sequences: int) -> RetomatonState:
        """Of sequences that have read nothing."""
        return cls(torch.empty(num_sequences, 0, dtype=torch.int64))

    @classmethod
    def joined(cls, states: list[RetomatonState]) -> RetomatonState:
        """The sequences of several states, one after the other."""
        width = max((state.rows_BP.shape[1] for state in states), default=0)
        parts = [torch.nn.functional.pad(s.rows_BP, (0, width - s.rows_BP.shape[1]), value=-1) for s in states]
        rows_BP = torch.cat(parts) if parts else torch.empty(0, 0, dtype=torch.int64)
        if all(state.reached_B is None for state in states):
            return cls(rows_BP)
        return cls(rows_BP, torch.cat([state.num_pointers for state in states]))

    def select(self, sequences: Tensor) -> RetomatonState:
        """The states of some sequences, by number or by a boolean each; one may come twice, as a beam search needs."""
        there = sequences.cpu()
        return RetomatonState(self.rows_BP[there], None if self.reached_B is None else self.reached_B[there])

    def reset(self, sequences_B: Tensor) -> RetomatonState:
        """The same with some sequences, given by a boolean each, as if they had read nothing."""
        there = sequences_B.cpu()
        reached_B = None if self.reached_B is None else self.reached_B.masked_fill(there, 0)
        return RetomatonState(self.rows_BP.masked_fill(there[:, None], -1), reached_B)


@dataclass(frozen=True)
class RetomatonStep:
    """Candidates of B sequences at one position each."""

    found: Candidates
    """On the device of the queries; scores as those of a search."""
    rows_BM: Tensor
    """int64 row of each candidate, -1 where there is none; on the host."""
    searched_B: Tensor
    """bool: whether the automaton needed a search there; on the host."""
    pointers_B: Tensor | None = None
    """int64 active pointers that the step began with; None where steps were put together."""

    def select(self, sequences: Tensor) -> RetomatonStep:
        """The step of some sequences, by number or by a boolean each; one may come twice."""
        here, there = sequences.to(self.found.scores_NM.device), sequences.cpu()
        found = Candidates(self.found.values_NM[here], self.found.scores_NM[here], self.found.keep_NM[here])
        return RetomatonStep(found, self.rows_BM[there], self.searched_B[there])

    @classmethod
    def joined(cls, steps: list[RetomatonStep]) -> RetomatonStep:
        """The sequences of several steps, one after the other."""
        width = max(step.rows_BM.shape[1] for step in steps)

        def filled(parts: list[Tensor], value: float) -> Tensor:
            return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in parts])

        found = Candidates(
            filled([step.found.values_NM for step in steps], -1),
            filled([step.found.scores_NM for step in steps], -torch.inf),
            filled([step.found.keep_NM for step in steps], False),
        )
        rows_BM = filled([step.rows_BM for step in steps], -1)
        return cls(found, rows_BM, torch.cat([step.searched_B for step in steps]))

    @classmethod
    def empty(cls, num_sequences: int) -> RetomatonStep:
        """Of sequences without candidates: nothing follows from it."""
        rows_BM = torch.empty(num_sequences, 0, dtype=torch.int64)
        found = Candidates(rows_BM, torch.empty(num_sequences, 0), rows_BM >= 0)
        return cls(found, rows_BM, torch.zeros(num_sequences, dtype=torch.bool))


class Retomaton:
    """RetoMaton: candidates by following the text after the last neighbours; searches only where too few follow.

    It holds no state: what a sequence has read is a ``RetomatonState``, a value. After ``step.select(beams)`` a state
    follows its beams. ``read_text`` in ``fairseq/memory/retomaton/reader.py`` scores given text.

    Source: arXiv 2201.12431, sec. 3.

    ```python
    automaton = Retomaton(memory, min_knns=1)
    state = automaton.start(num_sequences=3)
    step = automaton.lookup(query_ND, state)  # step.found: Candidates; step.searched_B: True where it searched
    state = automaton.follow(step, target_N)  # the tokens that came next
    ```
    """

    def __init__(
        self,
        external: ExternalMemory,
        *,
        min_knns: int = 1,
        max_knns: int = 1024,
        no_pointer: bool = False,
        clusters: Clusters | None = None,
        compat: bool = False,
    ) -> None:
        """Args.

        external: memory that is searched, and scores rows.
        min_knns: active pointers needed to skip a search.
        max_knns: limit on active pointers; a larger ``min_knns`` searches at every step.
        no_pointer: follow nothing, which is kNN-LM.
        clusters: clusters of the store's rows; None for none.
        compat: reproduce the original program: a row counts as often as it is reached, documents do not end, the
            clusters that most pointers lie in are added first and save no search, and the caller reads the sequences
            of a batch as one (docs/retomaton.md).
        Raises: ValueError when the clusters are not of the store.
        """
        if clusters is not None and clusters.num_rows != len(external.store):
            raise ValueError(
                f"clusters of {clusters.num_rows} rows do not fit datastore {external.store.prefix!r} of "
                f"{len(external.store)}; make them again with build_dstore.py --cluster_dstore"
            )
        self.external, self.min_knns, self.max_knns = external, min_knns, max_knns
        self.no_pointer, self.compat = no_pointer, compat
        self.role_R = row_roles(external, ignore_documents=compat)
        held = None if clusters is None or no_pointer else clusters
        self.clusters = _NO_CLUSTERS if held is None else (held.cluster_R, held.first_C, held.member_R)

    def start(self, num_sequences: int) -> RetomatonState:
        """State of sequences that have read nothing: their first step is a search."""
        return RetomatonState.empty(num_sequences)

    def lookup(self, query_BD: Tensor, state: RetomatonState, found: Found | None = None) -> RetomatonStep:
        """Candidates at the next position of each sequence: its active pointers, and neighbours if a search is needed.

        Args:
            query_BD: keys of the positions.
            state: what each sequence has read.
            found: gives the neighbours of those queries that a boolean each names, if they are known already.
        """
        assert len(query_BD) == len(state), (len(query_BD), len(state))
        host_BD = query_BD.detach().float().cpu().contiguous()
        searched_B = state.num_pointers < self.min_knns
        neighbors = self._searched(host_BD, searched_B, found)
        scores_BP = self.external.score_rows(host_BD, state.rows_BP)
        pointers_B = (state.rows_BP >= 0).sum(1)
        rows_BM, scores_BM, values_BM = self._joined(searched_B, neighbors, state.rows_BP, scores_BP, pointers_B)
        device = query_BD.device
        candidates = Candidates(values_BM.to(device), scores_BM.to(device), (rows_BM >= 0).to(device))
        return RetomatonStep(candidates, rows_BM, searched_B, pointers_B)

    def _joined(
        self, searched_B: Tensor, neighbors: Neighbors, rows_BP: Tensor, scores_BP: Tensor, pointers_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, scores and tokens of each sequence's candidates, (B, M)."""
        from fairseq.memory.retomaton import kernels

        count = len(rows_BP)
        width = int((pointers_B + neighbors.ids_NK.shape[1] * searched_B).max()) if count else 0
        found_at_B = torch.where(searched_B, searched_B.cumsum(0) - 1, -1)
        rows_BM, values_BM = (torch.empty(count, width, dtype=torch.int64) for _ in range(2))
        scores_BM, count_B = torch.empty(count, width), torch.zeros(count, dtype=torch.int64)
        found = tuple(x.contiguous().numpy() for x in (found_at_B, neighbors.ids_NK, neighbors.scores_NK))
        active = tuple(x.contiguous().numpy() for x in (rows_BP, scores_BP))
        joined = tuple(x.numpy() for x in (rows_BM, scores_BM, values_BM, count_B))
        tokens = self.external.row_tokens
        kernels.join(found, active, not self.compat, _NO_TOKENS if tokens is None else tokens, joined)
        most = int(count_B.max()) if count else 0
        if most < width:
            rows_BM, scores_BM, values_BM = (x[:, :most] for x in (rows_BM, scores_BM, values_BM))
        if tokens is None:
            values = self.external.store.values.take(rows_BM.clamp(min=0).reshape(-1)).view_as(rows_BM)
            values_BM = values.masked_fill_(rows_BM < 0, -1)
        return rows_BM, scores_BM, values_BM

    def _searched(self, query_BD: Tensor, searched_B: Tensor, found: Found | None) -> Neighbors:
        """Neighbours of the queries that need a search, one row for each."""
        if found is not None:
            return found(searched_B)
        if not bool(searched_B.any()):
            return Neighbors(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0))
        return self.external.neighbors(query_BD[searched_B])

    def follow(self, step: RetomatonStep, token_B: Tensor) -> RetomatonState:
        """State of each sequence after its next token: rows after the candidates that hold it, and their clusters."""
        count = len(step.rows_BM)
        if self.no_pointer:
            return RetomatonState.empty(count)
        from fairseq.memory.retomaton import kernels

        out_BP, count_B = np.empty((count, self.max_knns), np.int64), np.zeros(count, np.int64)
        tensors = (step.rows_BM, step.found.values_NM, step.found.scores_NM, token_B)
        rows_BM, values_BM, scores_BM, token = (x.detach().cpu().contiguous().numpy() for x in tensors)
        step_arrays = (rows_BM, values_BM, scores_BM, token)
        reached_B = np.zeros(count, np.int64)
        kernels.follow(step_arrays, self.role_R, not self.compat, self.clusters, (out_BP, count_B, reached_B))
        rows_BP = torch.from_numpy(out_BP[:, : count_B.max(initial=0)].copy())
        return RetomatonState(rows_BP, torch.from_numpy(reached_B) if self.compat else None)


def row_roles(external: ExternalMemory, *, ignore_documents: bool = False) -> Array:
    """uint8: what each row of a store is to a pointer (see ``kernels``)."""
    store, index = external.store, external.index
    from fairseq.memory.retomaton import kernels

    role_R = np.full(len(store), kernels.FOLLOWS, np.uint8)
    if not ignore_documents:
        role_R[store.documents.runs_R3[:, 0]] = kernels.FIRST
    role_R[store.deleted] = kernels.DELETED
    role_R[index.deleted] = kernels.DELETED  # also rows that the index dropped although the store holds them
    return role_R

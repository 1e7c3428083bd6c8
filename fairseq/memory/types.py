"""The values that the memory core hands around. Scores are *higher is closer* everywhere.

Shapes: N queries (scored positions), K neighbours, M candidates, T positions of one input, D key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from fairseq.memory.log_space import log_add

Array = npt.NDArray[Any]


class Metric(str, Enum):
    """Similarity of a query and a key. Scores are *higher is closer* for every metric.

    ```python
    assert Metric.parse("l2") is Metric.L2
    ```
    """

    L2 = "l2"  # minus the squared Euclidean distance
    IP = "ip"  # inner product
    COS = "cos"  # inner product of the vectors scaled to length one

    @classmethod
    def parse(cls, name: str) -> Metric:
        """Metric of a name: ``l2``, ``ip`` or ``cos``. Raises: ValueError with the known names."""
        try:
            return cls(name)
        except ValueError:
            raise ValueError(f"unknown metric {name!r}; known: {', '.join(m.value for m in cls)}") from None


@dataclass(frozen=True)
class Neighbors:
    """Result of a search: K rows of a store for each of N queries, best first.

    ```python
    found = ExactIndex(key_ND.numpy()).search(query_ND, k=4)
    found.ids_NK, found.scores_NK  # int64 and float32, (N, 4)
    ```
    """

    ids_NK: Tensor
    """int64 row numbers in the store, -1 where fewer than K were found."""
    scores_NK: Tensor
    """float32, higher is closer; -inf where the id is -1."""
    equals_by_row: bool = False
    """True if equally close neighbours are known to be in row order."""

    def __post_init__(self) -> None:
        assert self.ids_NK.shape == self.scores_NK.shape, (self.ids_NK.shape, self.scores_NK.shape)
        assert self.ids_NK.dtype == torch.int64, self.ids_NK.dtype


@dataclass(frozen=True)
class NeighborFacts:
    """More about N positions and their M neighbours, for combiners that learned to read it; None where nobody asks."""

    query_ND: Tensor | None = None
    """The position's key."""
    key_NMD: Tensor | None = None
    """The neighbours' keys; zeros where none was found."""
    stored_logp_NM: Tensor | None = None
    """ln p that the model gave to the neighbour's token where the neighbour was stored."""
    model_logp_NM: Tensor | None = None
    """ln p that the model gives to the neighbour's token at the position."""
    top_logp_NM: Tensor | None = None
    """The M largest ln p of the model at the position, falling."""

    def rows(self, part: slice | Tensor) -> NeighborFacts:
        """The facts about some positions."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return NeighborFacts(**{name: None if value is None else value[part] for name, value in given.items()})


@dataclass(frozen=True)
class Candidates:
    """Tokens that a memory offers to N positions: M each (or one shared row of M), with scores and a mask.

    Every method is a source of candidates and a combiner that turns them into one log-probability.

    ```python
    candidates = Candidates(
        values_NM=torch.tensor([[7, 9]]), scores_NM=torch.tensor([[-1.0, -2.0]]), keep_NM=torch.tensor([[True, True]])
    )
    candidates.same_token(torch.tensor([9]))  # tensor([[False, True]])
    ```
    """

    values_NM: Tensor
    """int64 or int32 token of each candidate; (N, M), or (1, M) when all positions share the candidates."""
    scores_NM: Tensor
    """float32 similarity before any temperature, higher is closer; (N, M)."""
    keep_NM: Tensor
    """bool, True where position n may use candidate m; (N, M)."""
    rows_NM: Tensor | None = None
    """int64 row of the datastore that each candidate comes from, -1 where none was found; None without a datastore."""
    facts: NeighborFacts | None = None
    """What a learned combiner reads besides; None for all others."""

    def __post_init__(self) -> None:
        assert self.scores_NM.shape == self.keep_NM.shape, (self.scores_NM.shape, self.keep_NM.shape)
        assert self.keep_NM.dtype == torch.bool, self.keep_NM.dtype

    def rows(self, part: slice | Tensor) -> Candidates:
        """The candidates of some positions."""
        values_NM = self.values_NM if len(self.values_NM) != len(self.scores_NM) else self.values_NM[part]
        rows_NM = None if self.rows_NM is None else self.rows_NM[part]
        facts = None if self.facts is None else self.facts.rows(part)
        return Candidates(values_NM, self.scores_NM[part], self.keep_NM[part], rows_NM, facts)

    def nearest(self, k: int) -> Candidates:
        """The first k of each position, without rows and facts; of neighbours, best first, those of a search for k."""
        return Candidates(self.values_NM[:, :k], self.scores_NM[:, :k], self.keep_NM[:, :k])

    def same_token(self, target_N: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
        """(N, M): True (or 1 in a numeric ``dtype``) where the candidate's token is the position's target."""
        out_NM = torch.empty(self.scores_NM.shape, dtype=dtype, device=target_N.device)
        # In 32 bits: comparing is vectorized where the types are of one width.
        return torch.eq(self.values_NM.int(), target_N.int()[:, None], out=out_NM)

    def keeps_all(self) -> bool:
        """True if every position may use every candidate."""
        if self.keep_NM.numel() and self.keep_NM.stride() == (0, 0):  # one permission for all of them
            return bool(self.keep_NM[0, 0])
        return not self.keep_NM.numel() or bool(self.keep_NM.contiguous().view(torch.uint8).amin())


@dataclass(frozen=True)
class Passage:
    """One input of the model, without padding: its positions are queries and memories at once.

    ```python
    passage = Passage(number=0, key_TD=key_ND[:8], value_T=token_N[:8], num_context=2)
    passage.queries.shape  # torch.Size([6, 16]): context is read, not scored
    ```
    """

    number: int
    """Place of its scored part in the text: the next passage continues it if its number is one higher."""
    key_TD: Tensor
    """Memory key of every position, context included."""
    value_T: Tensor
    """int64 token that comes after each position."""
    num_context: int
    """Positions at the start that are read but not scored: they belong to earlier passages."""

    @property
    def queries(self) -> Tensor:
        """Keys of the scored positions, (N, D)."""
        return self.key_TD[self.num_context :]

    @property
    def targets(self) -> Tensor:
        """Tokens that come after the scored positions, (N,)."""
        return self.value_T[self.num_context :]


@dataclass(frozen=True)
class LogSums:
    """Sums that a memory adds to each position's normalisation: sums of exp(score), in logarithms, -inf where empty."""

    hit_N: Tensor
    """float32, over the candidates whose token is the target."""
    whole_N: Tensor
    """float32, over all candidates."""

    def plus(self, other: LogSums | None) -> LogSums:
        """The sums over two memories together."""
        if other is None:
            return self
        return LogSums(log_add(self.hit_N, other.hit_N), log_add(self.whole_N, other.whole_N))


@dataclass(frozen=True)
class ScoredPositions:
    """Scored positions of a text, with the language model's log-probabilities: what a ``MemoryReader`` reads.

    ```python
    scored = ScoredPositions(torch.zeros(3, dtype=torch.int64), target_N, lm_logp_N, lm_norm_N, key_ND=query_ND)
    assert len(scored) == 3
    ```
    """

    block_N: Tensor
    """int64 number of the block each position stands in."""
    target_N: Tensor
    """int64 token that comes next."""
    logp_N: Tensor
    """float32 ln p of that token; empty when only keys were asked for."""
    norm_N: Tensor
    """float32 log-sum of the vocabulary's scores (adaptive softmax: of its head), as joint normalisation needs it."""
    key_ND: Tensor | None = None
    """Memory key of each position, in the model's precision; None when no reader needs it."""
    text_sums: LogSums | None = None
    """Contribution of the memories of the text itself; None without such memories."""

    def __len__(self) -> int:
        return len(self.target_N)

    def rows(self, part: slice | Tensor) -> ScoredPositions:
        """Some of the positions, in their order."""
        sums = self.text_sums
        return ScoredPositions(
            self.block_N[part.cpu() if isinstance(part, Tensor) else part],
            self.target_N[part],
            self.logp_N[part],
            self.norm_N[part],
            None if self.key_ND is None else self.key_ND[part],
            None if sums is None else LogSums(sums.hit_N[part], sums.whole_N[part]),
        )

    @property
    def keys(self) -> Tensor:
        """Keys of all positions, (N, D). Asking for keys that were not computed is a programming error."""
        assert self.key_ND is not None, "a reader that needs keys was given to a scorer that makes none"
        return self.key_ND

    @classmethod
    def joined(cls, parts: Sequence[ScoredPositions]) -> ScoredPositions:
        """Several batches as one. ``parts`` must not be empty."""
        names = ("block_N", "target_N", "logp_N", "norm_N")
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        key_ND = torch.cat([part.keys for part in parts]) if parts[0].key_ND is not None else None
        sums = [part.text_sums for part in parts if part.text_sums is not None]
        text_sums = LogSums(*(torch.cat([getattr(s, x) for s in sums]) for x in ("hit_N", "whole_N"))) if sums else None
        return cls(**columns, key_ND=key_ND, text_sums=text_sums)


class MemoryReader(Protocol):
    """Interface of a method: kNN-LM, TRIME and RetoMaton each turn the model's log-probabilities into their own.

    The evaluation loop takes any object with these members (``fairseq/evaluation/loop.py``).

    ```python
    class Halved:
        needs_keys, num_searched = False, None

        def logp(self, scored):
            return scored.logp_N - math.log(2)


    reader: MemoryReader = Halved()
    ```
    """

    @property
    def needs_keys(self) -> bool:
        """True if ``logp`` reads the keys of the positions."""
        ...

    @property
    def num_searched(self) -> int | None:
        """Number of positions searched so far; None if every position is searched."""
        ...

    def logp(self, scored: ScoredPositions) -> Tensor:
        """Log-probability of the targets with the memory mixed in, float32 (N,).

        ``scored`` holds whole blocks; in text order if the reader carries state across blocks.
        """
        ...

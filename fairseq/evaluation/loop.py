"""The evaluation loop: score batches, search neighbours in bulk, combine, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fairseq.memory.retomaton.reader import BlockReader
from fairseq.memory.types import Candidates, LogSums
from fairseq.metrics.perplexity import PerplexityReport
from fairseq.sequence_scorer import ScoredBatch, SequenceScorer


class Memory(Protocol):
    """Anything that offers candidates for keys of scored positions."""

    def lookup(self, query_ND: Tensor) -> Candidates:
        """Candidates for N positions."""
        ...


@dataclass(frozen=True)
class Retrieved:
    """Some scored positions with what a memory offers to them, before the two are combined."""

    block_N: Tensor
    target_N: Tensor
    lm_logp_N: Tensor
    lm_norm_N: Tensor
    near: LogSums | None
    """What the memories of the text add."""
    found: Candidates


def evaluate(
    scorer: SequenceScorer,
    batches: Iterable[Any],
    report: PerplexityReport,
    memory: Memory | BlockReader | None = None,
    combine: Callable[..., Tensor] | None = None,
    bulk: int = 65536,
    keep: Callable[[Retrieved], None] | None = None,
) -> float:
    """Score all batches into the report; returns the seconds it took.

    With an external memory, positions are collected and their neighbours searched ``bulk`` at a time: an index answers
    many queries at once much faster than a few. Memories of the text are the scorer's. ``keep`` is given what was
    found for each bulk before it is combined.
    """
    started = time.perf_counter()
    if combine is None:
        for batch in batches:
            scored = scorer.score(batch)
            report.add(scored.block_N, scored.target_N, scored.logp_N)
        return time.perf_counter() - started
    pending: list[ScoredBatch] = []
    waiting = 0
    for batch in batches:
        scored = scorer.score(batch)
        # Without an external memory the keys have served; waiting spares a dozen small operations with each batch.
        pending.append(scored if memory is not None else dataclasses.replace(scored, key_ND=None))
        waiting += len(scored.target_N)
        if waiting >= bulk:
            report.add(*_combined(pending, memory, combine, keep))
            pending, waiting = [], 0
    if pending:
        report.add(*_combined(pending, memory, combine, keep))
    return time.perf_counter() - started


def _combined(
    pending: Sequence[ScoredBatch],
    memory: Memory | BlockReader | None,
    combine: Callable[..., Tensor],
    keep: Callable[[Retrieved], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block, target and log-probability of some scored positions, memory included."""
    block_N, target_N, logp_N, norm_N = (
        torch.cat([getattr(scored, name) for scored in pending]) for name in ("block_N", "target_N", "logp_N", "norm_N")
    )
    if isinstance(memory, BlockReader):
        key_ND = torch.cat(_keys(pending))
        return block_N, target_N, memory.logp(block_N, target_N, logp_N, norm_N, key_ND, combine)
    near = [scored.near for scored in pending if scored.near is not None]
    text = LogSums(*(torch.cat([getattr(s, x) for s in near]) for x in ("hit_N", "whole_N"))) if near else None
    found = memory.lookup(torch.cat(_keys(pending))) if memory is not None else None
    if keep is not None:
        assert found is not None, "nothing is retrieved that could be kept"
        keep(Retrieved(block_N, target_N, logp_N, norm_N, text, found))
    return block_N, target_N, combine(logp_N, norm_N, found, target_N, text)


def _keys(pending: Sequence[ScoredBatch]) -> list[Tensor]:
    keys = [scored.key_ND for scored in pending]
    assert all(key is not None for key in keys), "a memory was given to a scorer that makes no keys"
    return keys  # type: ignore[return-value]

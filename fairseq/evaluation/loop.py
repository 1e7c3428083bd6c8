"""The evaluation loop: score batches, read the memory in bulk, report."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Protocol

from fairseq.memory.types import ScoredPositions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fairseq.data.types import LMBatch
    from fairseq.memory.types import MemoryReader
    from fairseq.metrics.perplexity import PerplexityReport


class Scorer(Protocol):
    """Turns a batch into scored positions; see ``fairseq.sequence_scorer.SequenceScorer``."""

    def score(self, batch: LMBatch) -> ScoredPositions:
        """Log-probability of every scored target, and its key where a reader needs it."""
        ...


class Watch(Protocol):
    """Looks at an evaluation while it runs; see ``fairseq.evaluation.prove``."""

    def begins_bulk(self) -> bool:
        """True if what was scored so far must be read before the next batch."""
        ...

    def before(self, batch: LMBatch) -> None:
        """A batch is about to be scored."""
        ...


def evaluate(
    scorer: Scorer,
    batches: Iterable[LMBatch],
    report: PerplexityReport,
    reader: MemoryReader | None = None,
    bulk: int = 65536,
    watch: Watch | None = None,
) -> float:
    """Score all batches into the report; returns the seconds it took.

    Args:
        reader: mixes a memory in; None is the language model alone. Memories of the text are the scorer's.
        bulk: positions the reader gets at once: an index answers many queries at once much faster than a few.
        watch: looks at each batch before it is scored.
    """
    started = time.perf_counter()
    if reader is None:
        for batch in batches:
            if watch is not None:
                watch.before(batch)
            scored = scorer.score(batch)
            report.add(scored.block_N, scored.target_N, scored.logp_N)
    else:
        for scored in bulks(scorer, batches, bulk, watch, needs_keys=reader.needs_keys):
            report.add(scored.block_N, scored.target_N, reader.logp(scored))
    return time.perf_counter() - started


def bulks(
    scorer: Scorer, batches: Iterable[LMBatch], bulk: int, watch: Watch | None = None, *, needs_keys: bool
) -> Iterator[ScoredPositions]:
    """Scored positions of whole batches, at least ``bulk`` at a time except at the end.

    Args:
        watch: as in :func:`evaluate`.
        needs_keys: keep the keys of the positions.
    """
    pending: list[ScoredPositions] = []
    waiting = 0
    for batch in batches:
        if watch is not None:
            if pending and watch.begins_bulk():
                yield ScoredPositions.joined(pending)
                pending, waiting = [], 0
            watch.before(batch)
        scored = scorer.score(batch)
        # Keys that nobody reads later are dropped here: joining them costs as much as all else.
        pending.append(scored if needs_keys else dataclasses.replace(scored, key_ND=None))
        waiting += len(scored)
        if waiting >= bulk:
            yield ScoredPositions.joined(pending)
            pending, waiting = [], 0
    if pending:
        yield ScoredPositions.joined(pending)

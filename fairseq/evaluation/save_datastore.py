"""eval_lm.py --save-knnlm-dstore: the key and the next token of every position of a split, in order, resumable."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.memory.datastore.datastore import DatastoreWriter
from fairseq.memory.datastore.documents import Documents

if TYPE_CHECKING:
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.types import Array
    from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_CHECKPOINTS = 5.0


@dataclass
class SavingProgress:
    """Where saving stands; kept with the rows that are safely on disk."""

    batch: int = 0
    """Batches done."""
    seen: int = 0
    """Positions the model has read as targets, those without full context included."""
    logp_sum: float = 0.0
    """Sum of ln p, when scores are computed too."""

    def to_dict(self) -> dict[str, float]:
        """As plain types."""
        return {"batch": self.batch, "seen": self.seen, "logp_sum": self.logp_sum}


@dataclass(frozen=True)
class StoreRows:
    """Which rows of the whole split's store this process writes."""

    first: int
    """Number of its first row."""
    count: int
    """Its rows."""
    skip: int
    """Scored positions at its beginning that make no row: the model reads them without full context."""
    total: int
    """Rows of the whole store."""


def store_rows(evaluation: Evaluation, stated: int | None) -> StoreRows:
    """The rows of the store: scored tokens less the first context window of the split, which has no full context.

    Raises: ValueError when the user stated another size, or when nothing is left.
    """
    part, context = evaluation.part, evaluation.context_window
    total = part.num_all_scored_tokens - context
    if total < 1:
        raise ValueError(
            f"the split has {part.num_all_scored_tokens} tokens to score and --context-window is {context}: no row "
            "would be saved; give a smaller context or a larger split"
        )
    if stated is not None and stated != total:
        raise ValueError(
            f"--dstore-size {stated} does not fit: {part.num_all_scored_tokens} scored tokens less the context "
            f"window of {context} make {total} rows; give {total} or leave the flag out"
        )
    skip = max(0, context - part.num_tokens_before)
    return StoreRows(max(0, part.num_tokens_before - context), part.num_scored_tokens - skip, skip, total)


def documents_of(evaluation: Evaluation, rows: StoreRows) -> Array:
    """Where the rows stand in the text (see ``Documents``)."""
    blocks = evaluation.dataset.dataset.blocks
    order = np.concatenate(evaluation.batches)
    return Documents.of_blocks(blocks.starts[order], blocks.sizes[order], blocks.document_starts(), rows.skip).runs_R3


def save_datastore(
    evaluation: Evaluation,
    scorer: SequenceScorer,
    writer: DatastoreWriter,
    *,
    with_scores: bool,
) -> tuple[float | None, float]:
    """Fill the store from where it stands and complete it.

    Returns: the mean -log2 p of all scored tokens (None unless ``with_scores``), and the seconds this call took.
    """
    started = saved = time.perf_counter()
    cursor = dict(writer.cursor or {})
    at = SavingProgress(int(cursor.get("batch", 0)), int(cursor.get("seen", 0)), float(cursor.get("logp_sum", 0.0)))
    if at.batch:
        logger.info("going on at row %d of %d", writer.rows_done, writer.num_rows)
    run = scorer.score if with_scores else scorer.keys
    skip = store_rows(evaluation, None).skip
    for batch in evaluation.iterator(at.batch):
        scored = run(batch)
        without_context = max(0, skip - at.seen)
        writer.append(_rows(scored.key_ND, without_context), _rows(scored.target_N, without_context))
        at.batch += 1
        at.seen += len(scored.target_N)
        if with_scores:
            at.logp_sum += float(scored.logp_N.double().sum())
        if time.perf_counter() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            writer.checkpoint(at.to_dict())
            saved = time.perf_counter()
    writer.checkpoint(at.to_dict())
    writer.finish()
    loss = -at.logp_sum / at.seen / math.log(2) if with_scores else None
    return loss, time.perf_counter() - started


def _rows(values: Any, skip: int) -> Any:
    return values[skip:] if skip else values

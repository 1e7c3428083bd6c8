"""The part of a split that one process scores, cut into blocks and batches."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq.checkpoints.legacy import FAIRSEQ_0_9, FAIRSEQ_0_12
from fairseq.data.batching import batch_by_size
from fairseq.data.batching_config import DatasetConfig
from fairseq.evaluation.config import EvaluationConfig

logger = logging.getLogger(__name__)

Blocks = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SplitPart:
    """The part of a split that one process scores: all of it, or a shard."""

    batches: list[np.ndarray[Any, Any]]
    num_blocks: int
    """Its blocks, including those dropped as too long."""
    num_total_tokens: int
    """Their tokens."""
    num_scored_tokens: int
    """Tokens of the batches."""
    num_tokens_before: int = 0
    """Tokens that the shards before this one score, where the order of the text is kept."""
    num_all_scored_tokens: int = 0
    """Tokens of all shards together, where the order of the text is kept."""
    digest: str = ""
    """Digest of the batches of all shards together, where the order of the text is kept."""


def block_size_for(given: int | None, trained: int, context_window: int, written_by: str = "") -> int:
    """Number of tokens that a block scores.

    The programs disagree about --tokens-per-sample in evaluation: fairseq 0.9 and its forks ignore it and take the
    checkpoint's less the context; 0.12 takes the given one less the context. For a checkpoint of ours it is the number
    of scored tokens where it is that already (by the checkpoint) or where the context leaves nothing of it, as the
    published commands of TRIME give it, and includes the context otherwise, as in 0.12.

    Args:
        given: --tokens-per-sample, or None.
        trained: the checkpoint's.
        written_by: kind of checkpoint, see ``Checkpoint.written_by``.
    Raises: ValueError when the context window leaves no token to score.
    """
    if given is None or written_by == FAIRSEQ_0_9:
        size = trained - context_window
        if size < 1:
            raise ValueError(
                f"--context-window {context_window} leaves nothing of the model's {trained} tokens per sample to "
                "score; give a smaller one, or --model-overrides \"{'tokens_per_sample': N}\" with N tokens of context "
                "and block together"
            )
        if given not in (None, size):
            logger.warning(
                "--tokens-per-sample %d is not used: as in fairseq 0.9, blocks have the checkpoint's %d tokens "
                "less --context-window %d, which is %d; --model-overrides \"{'tokens_per_sample': N}\" changes it",
                given,
                trained,
                context_window,
                size,
            )
        return size
    if written_by != FAIRSEQ_0_12 and (given == trained - context_window or given <= context_window):
        if context_window:
            logger.info("--tokens-per-sample %d: the tokens scored after each --context-window", given)
        return given
    if given <= context_window:
        raise ValueError(
            f"--tokens-per-sample {given} includes --context-window {context_window}, as in fairseq 0.12, and leaves "
            "nothing to score; give context and scored tokens together"
        )
    if context_window:
        logger.info(
            "--tokens-per-sample %d includes --context-window %d, as in fairseq 0.12: %d are scored at a time",
            given,
            context_window,
            given - context_window,
        )
    return given - context_window


def part_by_length(kept: Blocks, sizes: Blocks, config: EvaluationConfig, data: DatasetConfig) -> SplitPart:
    """A shard of contiguous blocks, of which those of like length share a batch."""
    first, after = (len(sizes) * shard // config.num_shards for shard in (config.shard_id, config.shard_id + 1))
    kept = kept[(kept >= first) & (kept < after)]
    order = kept[np.argsort(sizes[kept], kind="stable")]
    batches = batch_by_size(order, sizes, data.max_tokens, data.max_sentences, 1) if len(kept) else []
    return SplitPart(batches, after - first, int(sizes[first:after].sum()), int(sizes[kept].sum()))


def _digest(*arrays: Blocks) -> str:
    return hashlib.sha256(b"".join(array.astype(np.int64).tobytes() for array in arrays)).hexdigest()


def part_in_order(kept: Blocks, sizes: Blocks, config: EvaluationConfig, data: DatasetConfig) -> SplitPart:
    """A shard of contiguous batches of the whole split, in the order of the text.

    The batches are those of a run without shards: a matrix product may round differently in a batch of another size,
    and so every key is the same, to the last bit, however many shards there are.
    Raises: ValueError when there are more shards than batches.
    """
    batches = batch_by_size(kept, sizes, data.max_tokens, data.max_sentences, 1) if len(kept) else []
    count = len(batches)
    scored = np.cumsum([0, *(int(sizes[batch].sum()) for batch in batches)])
    # Batches whose tokens all lack full context make no row of a datastore; they go to the first shard.
    early = min(int((scored[1:] <= config.context_window).sum()), max(0, count - 1))
    if config.num_shards > count - early and count:
        raise ValueError(
            f"--num-shards {config.num_shards} is too many: {config.gen_subset} makes {count - early} batches to "
            f"share; give at most {count - early}, or make smaller batches (--max-tokens, --max-sentences)"
        )
    low, high = (
        early + (count - early) * shard // config.num_shards if shard else 0
        for shard in (config.shard_id, config.shard_id + 1)
    )
    first = int(batches[low][0]) if low else 0
    after = int(batches[high][0]) if high < count else len(sizes)
    return SplitPart(
        batches=batches[low:high],
        num_blocks=after - first,
        num_total_tokens=int(sizes[first:after].sum()),
        num_scored_tokens=int(scored[high] - scored[low]),
        num_tokens_before=int(scored[low]),
        num_all_scored_tokens=int(scored[-1]),
        digest=_digest(kept, sizes[kept], np.array([len(batch) for batch in batches])),
    )

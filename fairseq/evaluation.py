"""Evaluation of a language model on a split: what is read, in which batches, and the loop over them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, load_model_for
from fairseq.data.batching import batch_by_size, filter_by_size
from fairseq.data.batching_config import DatasetConfig
from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.evaluation_config import EvaluationConfig
from fairseq.memory.sources.retomaton_reading import BlockReader
from fairseq.memory.types import LogSums
from fairseq.models.config import KEY_TAPS
from fairseq.registry import lookup
from fairseq.runtime.config import RuntimeConfig
from fairseq.runtime.distributed import runs_on_gpu
from fairseq.sequence_scorer import ScoredBatch, SequenceScorer
from fairseq.tasks.configs import LanguageModelingConfig
from fairseq.tasks.language_modeling import LanguageModelingTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from fairseq.data.iterators import EpochBatchIterator
    from fairseq.memory.types import Candidates
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import Settings

logger = logging.getLogger(__name__)

Blocks = np.ndarray[Any, Any]


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


@dataclass(frozen=True)
class SplitPart:
    """The part of a split that one process scores: all of it, or a shard."""

    batches: list[np.ndarray[Any, Any]]
    num_blocks: int
    """Its blocks, those that are left out as too long included."""
    num_total_tokens: int
    """Their tokens."""
    num_scored_tokens: int
    """Tokens of the batches."""
    num_tokens_before: int = 0
    """Tokens that the shards before this one score, where the order of the text is kept."""
    num_all_scored_tokens: int = 0
    """Tokens of all shards together, likewise."""
    digest: str = ""
    """What tells the batches of all shards together from others, likewise."""


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation needs, opened and checked."""

    task: LanguageModelingTask
    models: list[Any]
    checkpoint: Checkpoint
    dataset: LMContextWindowDataset
    part: SplitPart
    context_window: int
    key_tap: str
    """Which inner state of the first model is the memory key."""
    device: torch.device
    num_workers: int

    @property
    def batches(self) -> list[np.ndarray[Any, Any]]:
        """The blocks of each batch."""
        return self.part.batches

    @property
    def num_total_tokens(self) -> int:
        """Tokens of this part of the split, those in blocks that are left out included."""
        return self.part.num_total_tokens

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that will be scored."""
        return self.part.num_scored_tokens

    def iterator(self, first: int = 0) -> EpochBatchIterator:
        """The batches from number ``first`` on, in order."""
        return self.task.iterator(self.dataset, self.batches[first:], num_workers=self.num_workers)


def block_size_for(given: int | None, trained: int, context_window: int) -> int:
    """How many tokens a block scores.

    The originals disagree about --tokens-per-sample in evaluation: fairseq 0.9's forks ignore it and take the
    checkpoint's less the context, fairseq 0.12 takes the given one less the context, and the published commands
    of TRIME give the number of scored tokens. All published commands come out right so: what is given counts as
    the scored tokens when it is that already (by the checkpoint) or when the context leaves nothing of it.

    Raises: ValueError when the context window leaves no token to score.
    """
    if given is None:
        size = trained - context_window
        if size < 1:
            raise ValueError(
                f"--context-window {context_window} leaves nothing of the model's {trained} tokens per sample to "
                "score; give a smaller one, or --tokens-per-sample with the number of tokens to score at a time"
            )
        return size
    return given if given == trained - context_window or given <= context_window else given - context_window


def open_evaluation(settings: Settings, *, in_order: bool) -> Evaluation:
    """Load models and text and cut the text into batches.

    Args:
        in_order: keep the order of the text (for a datastore); otherwise blocks of like length share a batch.
    Raises: ValueError or OSError when anything does not fit, before any model runs.
    """
    config = settings.config(EvaluationConfig)
    runtime = settings.config(RuntimeConfig)
    data = settings.config(DatasetConfig)
    paths = str(config.path).split(":")
    checkpoints = [load_checkpoint(path) for path in paths]
    trained = dict(checkpoints[0].config.get("task", {}))
    block_size = block_size_for(
        settings.given.get("tokens_per_sample"), int(trained.get("tokens_per_sample") or 1024), config.context_window
    )
    task = LanguageModelingTask(
        settings.config(
            LanguageModelingConfig,
            tokens_per_sample=block_size,
            add_bos_token=settings.given.get("add_bos_token", bool(trained.get("add_bos_token", False))),
        )
    )
    blocks = task.blocks(config.gen_subset)
    device = torch.device("cuda" if runs_on_gpu(runtime) else "cpu")
    models = [_prepared(settings, c, path, task, device) for c, path in zip(checkpoints, paths)]
    longest = min((model.longest_input for model in models if model.longest_input), default=None)
    if longest is not None and block_size + config.context_window > longest:
        raise ValueError(
            f"{block_size} tokens to score after --context-window {config.context_window} make inputs longer than the "
            f"{longest} learned positions of the model; give a smaller --context-window or --tokens-per-sample"
        )
    limit = settings.given.get("max_target_positions") or min(model.max_positions for model in models)
    if config.score_all:
        blocks = blocks.with_long_blocks_split(limit)
    elif block_size + config.context_window > limit:
        logger.info("inputs of up to %d tokens, the model was made for %d", block_size + config.context_window, limit)
    kept, _ = filter_by_size(np.arange(len(blocks.sizes)), blocks.sizes, max(limit, block_size))
    dataset = LMContextWindowDataset(
        blocks, kept, context_window=config.context_window, max_len=max(block_size + config.context_window, limit)
    )
    part = (part_in_order if in_order else part_by_length)(kept, blocks.sizes, config, data)
    if not part.batches:
        raise ValueError(
            f"nothing to score: of the {part.num_blocks} blocks in this part of {config.gen_subset} none is within the "
            f"model's {limit} positions; --score-all cuts them, fewer --num-shards make larger parts"
        )
    return Evaluation(
        task=task,
        models=models,
        checkpoint=checkpoints[0],
        dataset=dataset,
        part=part,
        context_window=config.context_window,
        key_tap=_key_tap(settings, models[0]),
        device=device,
        num_workers=data.num_workers,
    )


def _prepared(settings: Settings, checkpoint: Checkpoint, path: str, task: LanguageModelingTask, device: Any) -> Any:
    """A model on its device, in its precision, in evaluation mode."""
    runtime = settings.config(RuntimeConfig)
    overrides = dict(settings.config(EvaluationConfig).model_overrides or {})
    overrides.pop("knn_keytype", None)  # where keys are read is no part of the model: see _key_tap
    model = load_model_for(task.dictionary, checkpoint, path, overrides)
    if runtime.any_fp16 and device.type == "cpu":
        logger.warning("--fp16 needs a GPU; the model runs in float32 (--bf16 runs on processors)")
    elif runtime.any_fp16:
        model = model.half()
    if runtime.any_bf16:
        model = model.bfloat16()
    return model.to(device).eval().requires_grad_(False)


def _key_tap(settings: Settings, model: Any) -> str:
    """Which inner state is the key: what the words say, else what the model was trained with."""
    overrides = settings.config(EvaluationConfig).model_overrides or {}
    given: str | None = settings.given.get("knn_keytype") or overrides.get("knn_keytype")
    if given is not None:
        lookup(dict.fromkeys(KEY_TAPS), given, "--knn-keytype")
    return given or model.config.knn_keytype or "last_ffn_input"


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

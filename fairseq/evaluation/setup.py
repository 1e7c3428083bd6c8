"""Opening an evaluation: checkpoints, text and batches, checked before any model runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint
from fairseq.config import build
from fairseq.data.batching import filter_by_size
from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.evaluation.splits import SplitPart, block_size_for, part_by_length, part_in_order
from fairseq.models.config import KEY_TAPS, layer_of_tap
from fairseq.registry import lookup
from fairseq.runtime.distributed import runs_on_gpu
from fairseq.sequence_scorer import MixedDecoder
from fairseq.tasks.configs import GraphLanguageModelingConfig, LanguageModelingConfig, graph_options
from fairseq.tasks.language_modeling import LanguageModelingTask

if TYPE_CHECKING:
    from fairseq.data.iterators import EpochBatchIterator
    from fairseq.evaluation.config import EvaluationConfig, EvaluationConfigs
    from fairseq.models.transformer_lm import TransformerLanguageModel

logger = logging.getLogger(__name__)

# --model-overrides of the checkpoint's task, which fairseq 0.9 reads from there.
TASK_OVERRIDES: dict[str, type] = {"tokens_per_sample": int, "add_bos_token": bool}


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation needs, opened and checked."""

    task: LanguageModelingTask
    models: list[TransformerLanguageModel]
    checkpoint: Checkpoint
    dataset: LMContextWindowDataset
    part: SplitPart
    context_window: int
    key_tap: str
    """Inner state of the first model that is the memory key."""
    device: torch.device
    num_workers: int
    decoder: MixedDecoder | None = None
    """A decoder that is mixed into the models."""

    @property
    def batches(self) -> list[np.ndarray[Any, Any]]:
        """The blocks of each batch."""
        return self.part.batches

    @property
    def num_total_tokens(self) -> int:
        """Tokens of this part of the split, including those in dropped blocks."""
        return self.part.num_total_tokens

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that will be scored."""
        return self.part.num_scored_tokens

    def iterator(self, first: int = 0) -> EpochBatchIterator:
        """The batches from number ``first`` on, in order."""
        return self.task.iterator(self.dataset, self.batches[first:], num_workers=self.num_workers)


def open_evaluation(configs: EvaluationConfigs, *, in_order: bool) -> Evaluation:
    """Load models and text and cut the text into batches.

    Args:
        in_order: keep the order of the text (for a datastore); otherwise blocks of like length share a batch.
    Raises: ValueError or OSError when anything does not fit, before any model runs.
    """
    config, data, stated = configs.evaluation, configs.data, configs.task_options
    paths = str(config.path).split(":")
    checkpoints = [load_checkpoint(path) for path in paths]
    trained = dict(checkpoints[0].config.get("task", {}))
    trained |= _task_overrides(config)
    block_size = block_size_for(
        stated.get("tokens_per_sample"),
        int(trained.get("tokens_per_sample") or 1024),
        config.context_window,
        checkpoints[0].written_by,
    )
    task = _task(configs, trained, block_size)
    blocks = task.blocks(config.gen_subset)
    device = torch.device("cuda" if runs_on_gpu(configs.runtime) else "cpu")
    models = [_prepared(configs, c, path, task) for c, path in zip(checkpoints, paths)]
    task.attach(models, trains=False)
    for path, checkpoint in zip(paths, checkpoints):
        task.check_checkpoint(path, checkpoint.config.get("task", {}))
    decoder = _decoder(configs, task)
    readers = [*models, *([] if decoder is None else [decoder.model])]
    longest = min((model.longest_input for model in readers if model.longest_input), default=None)
    if longest is not None and block_size + config.context_window > longest:
        raise ValueError(
            f"{block_size} tokens to score after --context-window {config.context_window} make inputs longer than the "
            f"{longest} learned positions of the model; give a smaller --context-window or --tokens-per-sample"
        )
    limit = stated.get("max_target_positions") or min(model.max_positions for model in readers)
    if config.score_all:
        blocks = blocks.with_long_blocks_split(limit)
    elif block_size + config.context_window > limit:
        logger.info("inputs of up to %d tokens, the model was made for %d", block_size + config.context_window, limit)
    kept, _ = filter_by_size(np.arange(len(blocks.sizes)), blocks.sizes, max(limit, block_size))
    dataset = LMContextWindowDataset(
        blocks, kept, context_window=config.context_window, max_len=_longest_row(block_size, config, task, limit)
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
        key_tap=_key_tap(configs, models[0]),
        device=device,
        num_workers=data.num_workers,
        decoder=decoder,
    )


def _task(configs: EvaluationConfigs, trained: Mapping[str, Any], block_size: int) -> LanguageModelingTask:
    """The task of a checkpoint, with what the user stated; a GNN-LM that is taken alone needs no neighbours.

    Raises: ValueError or OSError as the tasks, and for options of a task that the checkpoint is not of.
    """
    stated = dict(configs.task_options)
    settings = stated | {
        "tokens_per_sample": block_size,
        "add_bos_token": stated.get("add_bos_token", bool(trained.get("add_bos_token", False))),
    }
    evaluation = configs.evaluation
    graph = graph_options(trained, stated, evaluation.model_overrides, evaluation.path)
    if graph is None:
        return LanguageModelingTask(build(LanguageModelingConfig, settings))
    from fairseq.tasks.graph_language_modeling import GraphLanguageModelingTask

    return GraphLanguageModelingTask(build(GraphLanguageModelingConfig, graph | settings))


def _task_overrides(config: EvaluationConfig) -> dict[str, Any]:
    """Those of --model-overrides that belong to the task. Raises: ValueError for one of another type."""
    found = {name: value for name, value in (config.model_overrides or {}).items() if name in TASK_OVERRIDES}
    for name, value in found.items():
        kind = TASK_OVERRIDES[name]
        if not isinstance(value, kind) or (isinstance(value, int) and kind is int and value < 1):
            example = "True or False" if kind is bool else "a positive integer"
            raise ValueError(f"--model-overrides: {name} {value!r} is not {example}; give one")
    return found


def _longest_row(block_size: int, config: EvaluationConfig, task: LanguageModelingTask, limit: int) -> int:
    """Length that the context fills a row up to; with <s> before each block fairseq counts that symbol in."""
    row = block_size + config.context_window
    return row if task.config.add_bos_token else max(row, limit)


def _prepared(
    configs: EvaluationConfigs, checkpoint: Checkpoint, path: str, task: LanguageModelingTask
) -> TransformerLanguageModel:
    """A model on its device, in its precision, in evaluation mode."""
    overrides = dict(configs.evaluation.model_overrides or {})
    overrides.pop("knn_keytype", None)  # where keys are read is no part of the model: see _key_tap
    for name in TASK_OVERRIDES:  # of the text, not of the model: see open_evaluation
        overrides.pop(name, None)
    return task.load_model(checkpoint, path, overrides, configs.runtime)


def _decoder(configs: EvaluationConfigs, task: LanguageModelingTask) -> MixedDecoder | None:
    """The decoder of --memory-decoder. Raises: ValueError when it is not of this dictionary."""
    path, weight = configs.decoder.memory_decoder, configs.decoder.decoder_weight
    if path is None or weight is None:
        return None
    return MixedDecoder(task.load_model(load_checkpoint(path), path, None, configs.runtime), weight)


def _key_tap(configs: EvaluationConfigs, model: TransformerLanguageModel) -> str:
    """The inner state that is the key: what the user named, else what the model was trained with."""
    overrides = configs.evaluation.model_overrides or {}
    given: str | None = configs.key_tap or overrides.get("knn_keytype")
    if given is not None:
        lookup(dict.fromkeys((*KEY_TAPS, given if layer_of_tap(given) else "layer_1")), given, "--knn-keytype")
    return given or model.config.knn_keytype or "last_ffn_input"

"""eval_lm.py --save-knnlm-dstore: the key and the next token of every position of a split, in order, resumable."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fairseq.evaluation.outputs import write_evaluation_manifest
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.datastore.layout import side_file
from fairseq.memory.datastore.metadata import OVERWRITE, is_saved, shard_prefix
from fairseq.memory.datastore.writer import DatastoreWriter

if TYPE_CHECKING:
    from fairseq.evaluation.config import EvaluationConfigs
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.types import Array
    from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)

_SECONDS_TO_JOIN = 60.0  # another shard's joining takes a moment


@dataclass
class SavingProgress:
    """Position of a save, kept with the rows that are safely on disk."""

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
    """Rows of the whole split's store that this process writes."""

    first: int
    """Number of its first row."""
    count: int
    """Its rows."""
    skip: int
    """Scored positions at its beginning that make no row: the model reads them without full context."""
    total: int
    """Rows of the whole store."""


def store_rows(evaluation: Evaluation, stated: int | None, *, all_tokens: bool = False) -> StoreRows:
    """The rows of the store: scored tokens less the first context window of the split, which has no full context.

    Args:
        stated: --dstore-size; None compares nothing.
        all_tokens: keep that window too.
    Raises: ValueError when the user stated another size, or when nothing is left.
    """
    part, context = evaluation.part, 0 if all_tokens else evaluation.context_window
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
    """Positions of the rows in the text (see ``Documents``)."""
    blocks = evaluation.dataset.dataset.blocks
    order = np.concatenate(evaluation.batches)
    return Documents.of_blocks(blocks.starts[order], blocks.sizes[order], blocks.document_starts(), rows.skip).runs_R3


def save_datastore(
    evaluation: Evaluation,
    scorer: SequenceScorer,
    writer: DatastoreWriter,
    *,
    with_scores: bool,
    skip: int,
) -> tuple[float | None, float]:
    """Fill the store from where it stands and complete it.

    Args:
        skip: scored positions at the beginning that make no row.
    Returns: the mean -log2 p of all scored tokens (None unless ``with_scores``), and the seconds this call took.
    """
    started = time.perf_counter()
    cursor = dict(writer.cursor or {})
    at = SavingProgress(int(cursor.get("batch", 0)), int(cursor.get("seen", 0)), float(cursor.get("logp_sum", 0.0)))
    if at.batch:
        logger.info("resuming at row %d of %d", writer.rows_done, writer.num_rows)
    run = scorer.score if with_scores else scorer.keys
    for batch in evaluation.iterator(at.batch):
        scored = run(batch)
        without_context = max(0, skip - at.seen)
        writer.append(_rows(scored.keys, without_context), _rows(scored.target_N, without_context))
        at.batch += 1
        at.seen += len(scored.target_N)
        if with_scores:
            at.logp_sum += float(scored.logp_N.double().sum())
        writer.checkpoint_when_due(at.to_dict())
    writer.checkpoint(at.to_dict())
    writer.finish()
    loss = -at.logp_sum / at.seen / math.log(2) if with_scores else None
    return loss, time.perf_counter() - started


def _rows(values: Tensor, skip: int) -> Tensor:
    return values[skip:] if skip else values


def store_prefixes(configs: EvaluationConfigs) -> tuple[str, str]:
    """Prefix of the whole store, and of what this process writes: the same, or that of its shard."""
    prefix, config = str(configs.memory.dstore_mmap), configs.evaluation
    sharded = config.num_shards > 1
    return prefix, shard_prefix(prefix, config.shard_id, config.num_shards) if sharded else prefix


def check_place(configs: EvaluationConfigs) -> dict[str, Any]:
    """What is known of the store before a model is loaded.

    Raises: ValueError where a complete store of anything else, or files of another program, are in the way.
    """
    from fairseq.runtime.manifest import file_digest

    config = configs.evaluation
    facts = {"subset": config.gen_subset, "model_digest": file_digest(str(config.path))}
    for prefix in store_prefixes(configs):
        is_saved(prefix, configs.knn.key_dtype, facts, overwrite=configs.memory.overwrite_dstore)
    return facts


def save_and_report(
    configs: EvaluationConfigs, evaluation: Evaluation, scorer: SequenceScorer, facts: Mapping[str, Any]
) -> None:
    """Write the datastore, or one shard of it, and print rows, speed and, if asked for, the perplexity.

    Args:
        facts: of :func:`check_place`, which reads the whole checkpoint.
    """
    config, memory_config, knn = configs.evaluation, configs.memory, configs.knn
    rows = store_rows(evaluation, knn.dstore_size, all_tokens=memory_config.all_tokens)
    dim = evaluation.models[0].key_dim(evaluation.key_tap)
    whole, prefix = store_prefixes(configs)
    sharded, overwrite = prefix != whole, memory_config.overwrite_dstore
    metadata = _metadata(configs, evaluation, facts)
    saved = is_saved(whole, knn.key_dtype, metadata | {"rows": rows.total, "dim": dim}, overwrite=overwrite)
    if sharded:
        metadata |= {"shard_id": config.shard_id, "num_shards": config.num_shards}
        metadata |= {"first_row": rows.first, "total_rows": rows.total}
        saved = is_saved(prefix, knn.key_dtype, metadata | {"rows": rows.count, "dim": dim}, overwrite=overwrite)
    if saved:
        sys.stdout.write(f"{prefix} is complete already; {OVERWRITE} saves it again\n")
        manifest = side_file(prefix, "run.json")
        if not os.path.exists(manifest):  # killed between the store and its manifest
            write_evaluation_manifest(configs, evaluation, manifest, {"rows": rows.count})
        if sharded:
            _join(configs, evaluation)
        return
    with DatastoreWriter(
        prefix,
        num_rows=rows.count,
        dim=dim,
        dtype=knn.key_dtype,
        metadata=metadata,
        documents=documents_of(evaluation, rows),
    ) as writer:
        loss, seconds = save_datastore(
            evaluation, scorer, writer, with_scores=memory_config.score_while_saving, skip=rows.skip
        )
    scored, total = evaluation.num_scored_tokens, evaluation.num_total_tokens
    rate = scored / seconds if seconds else 0.0
    figures: dict[str, Any] = {"rows": writer.num_rows, "num_tokens": scored, "num_total_tokens": total}
    figures |= {"seconds": seconds, "tokens_per_second": rate}
    sys.stdout.write(f"Evaluated {scored} tokens in {seconds:.1f}s ({rate:.2f} tokens/s)\n")
    if loss is not None:
        figures |= {"loss_base2": loss, "perplexity": 2.0**loss}
        sys.stdout.write(f"Loss (base 2): {loss:.4f}, Perplexity: {2.0**loss:.2f}\n")
    sys.stdout.write(f"saved {writer.num_rows} keys of width {writer.dim} to {prefix}\n")
    write_evaluation_manifest(configs, evaluation, side_file(prefix, "run.json"), figures)
    if sharded:
        _join(configs, evaluation)


def _metadata(configs: EvaluationConfigs, evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything by which a store's rows differ from those of another model, text or setting."""
    from fairseq.runtime.manifest import file_digest

    config, dictionary = configs.evaluation, evaluation.task.dictionary
    blocks = evaluation.dataset.dataset.blocks
    all_tokens = {"all_tokens": True} if configs.memory.all_tokens else {}
    return {
        **all_tokens,
        **evaluation.task.facts(config.gen_subset),
        "key_tap": evaluation.key_tap,
        "context_window": evaluation.context_window,
        "add_bos_token": evaluation.task.config.add_bos_token,
        "longest_input": evaluation.dataset.max_len,
        **facts,
        "dictionary_digest": dictionary.digest(),
        "dictionary_size": len(dictionary),
        "text_digest": file_digest(evaluation.task.prefix(config.gen_subset) + ".bin"),
        "document_unit": blocks.document_unit,
        "num_documents": len(blocks.document_starts()),
        "batches_digest": evaluation.part.digest,
        "model_dtype": str(next(evaluation.models[0].parameters()).dtype).removeprefix("torch."),
        "model_overrides": repr(sorted((config.model_overrides or {}).items())),
        "with_scores": configs.memory.score_while_saving,
    }


def _join(configs: EvaluationConfigs, evaluation: Evaluation) -> None:
    """Make the store of its parts if this shard was the last that was missing."""
    from fairseq.memory.datastore.merge import join_shards

    prefix = str(configs.memory.dstore_mmap)
    try:
        metadata = join_shards(prefix, configs.evaluation.num_shards, seconds=_SECONDS_TO_JOIN)
    except ValueError as error:  # a part of an earlier command, which may be saved again later
        logger.warning("the parts make no datastore yet: %s", error)
        return
    if metadata is not None:
        figures = {"rows": metadata["rows"], "parts": len(metadata["parts"])}
        sys.stdout.write(f"{prefix}: {figures['rows']} keys in {figures['parts']} parts\n")
        write_evaluation_manifest(configs, evaluation, side_file(prefix, "run.json"), figures)

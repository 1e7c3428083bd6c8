"""What eval_lm.py --save-knnlm-dstore writes: a datastore, or one shard's part of it."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from fairseq.evaluation.config import EvaluationConfig, MemoryEvaluationConfig
from fairseq.evaluation.outputs import leave_manifest

if TYPE_CHECKING:
    from fairseq.evaluation.setup import Evaluation
    from fairseq.options import Settings

logger = logging.getLogger(__name__)

_SECONDS_TO_JOIN = 60.0  # another shard's joining takes a moment


def save(settings: Settings, evaluation: Evaluation, scorer: Any) -> None:
    """Write the datastore and print how it went."""
    from fairseq.evaluation.save_datastore import documents_of, save_datastore, store_rows
    from fairseq.memory.datastore.datastore import DatastoreWriter
    from fairseq.memory.datastore.metadata import is_there, part_prefix
    from fairseq.memory.sources.config import KnnConfig

    memory_config = settings.config(MemoryEvaluationConfig)
    knn = settings.config(KnnConfig)
    config = settings.config(EvaluationConfig)
    rows = store_rows(evaluation, knn.dstore_size)
    prefix, sharded = str(memory_config.dstore_mmap), config.num_shards > 1
    about = _about_rows(settings, evaluation)
    if sharded:
        prefix = part_prefix(prefix, config.shard_id, config.num_shards)
        about |= {"shard_id": config.shard_id, "num_shards": config.num_shards}
        about |= {"first_row": rows.first, "total_rows": rows.total}
        if is_there(prefix, about | {"rows": rows.count, "key_dtype": knn.key_dtype}):
            sys.stdout.write(f"{prefix} is complete already; remove {prefix}.json to save it anew\n")
            _join(settings, evaluation)
            return
    with DatastoreWriter(
        prefix,
        num_rows=rows.count,
        dim=evaluation.models[0].key_dim(evaluation.key_tap),
        dtype=knn.key_dtype,
        metadata=about,
        documents=documents_of(evaluation, rows),
    ) as writer:
        loss, seconds = save_datastore(evaluation, scorer, writer, with_scores=memory_config.score_while_saving)
    scored, total = evaluation.num_scored_tokens, evaluation.num_total_tokens
    rate = scored / seconds if seconds else 0.0
    figures: dict[str, Any] = {"rows": writer.num_rows, "num_tokens": scored, "num_total_tokens": total}
    figures |= {"seconds": seconds, "tokens_per_second": rate}
    sys.stdout.write(f"Evaluated {scored} tokens in {seconds:.1f}s ({rate:.2f} tokens/s)\n")
    if loss is not None:
        figures |= {"loss_base2": loss, "perplexity": 2.0**loss}
        sys.stdout.write(f"Loss (base 2): {loss:.4f}, Perplexity: {2.0**loss:.2f}\n")
    sys.stdout.write(f"saved {writer.num_rows} keys of width {writer.dim} to {prefix}\n")
    leave_manifest(settings, evaluation, f"{prefix}.run.json", figures)
    if sharded:
        _join(settings, evaluation)


def _about_rows(settings: Settings, evaluation: Evaluation) -> dict[str, Any]:
    """What tells a store's rows from those of another model, text or setting."""
    from fairseq.runtime.manifest import file_digest

    config = settings.config(EvaluationConfig)
    dictionary = evaluation.task.dictionary
    blocks = evaluation.dataset.dataset.blocks
    return {
        "key_tap": evaluation.key_tap,
        "context_window": evaluation.context_window,
        "subset": config.gen_subset,
        "model_digest": file_digest(str(config.path)),
        "dictionary_digest": dictionary.digest(),
        "dictionary_size": len(dictionary),
        "text_digest": file_digest(evaluation.task.prefix(config.gen_subset) + ".bin"),
        "document_unit": blocks.document_unit,
        "num_documents": len(blocks.document_starts()),
        "batches_digest": evaluation.part.digest,
        "model_dtype": str(next(evaluation.models[0].parameters()).dtype).removeprefix("torch."),
        "model_overrides": repr(sorted((config.model_overrides or {}).items())),
        "with_scores": settings.config(MemoryEvaluationConfig).score_while_saving,
    }


def _join(settings: Settings, evaluation: Evaluation) -> None:
    """Make the store of its parts if this shard was the last that was missing."""
    from fairseq.memory.datastore.merge import join_shards

    prefix = str(settings.config(MemoryEvaluationConfig).dstore_mmap)
    try:
        about = join_shards(prefix, settings.config(EvaluationConfig).num_shards, seconds=_SECONDS_TO_JOIN)
    except ValueError as error:  # a part of an earlier command, which may be saved anew later
        logger.warning("the parts make no datastore yet: %s", error)
        return
    if about is not None:
        figures = {"rows": about["rows"], "parts": len(about["parts"])}
        sys.stdout.write(f"{prefix}: {figures['rows']} keys in {figures['parts']} parts\n")
        leave_manifest(settings, evaluation, f"{prefix}.run.json", figures)


def as_shard_of_torchrun(settings: Settings) -> Settings:
    """Each process that torchrun starts saves the shard of its rank, on its own device."""
    count, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if "TORCHELASTIC_RUN_ID" not in os.environ or count == 1:
        return settings
    if {"num_shards", "shard_id"} & settings.given.keys():
        raise ValueError(f"torchrun makes a shard of each of its {count} processes; leave out --num-shards, --shard-id")
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return dataclasses.replace(settings, given=dict(settings.given) | {"num_shards": count, "shard_id": rank})

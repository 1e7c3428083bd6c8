"""What --save-retrieval keeps of an evaluation with a datastore: each scored token and its neighbours."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.evaluation.config import BulkConfig, EvaluationConfig, TrimeEvaluationConfig
from fairseq.evaluation.outputs import leave_manifest
from fairseq.memory.sources.config import KnnConfig

if TYPE_CHECKING:
    from fairseq.evaluation.loop import Retrieved
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.retrieval.file import Retrieval
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.options import Settings

logger = logging.getLogger(__name__)

Keep = Callable[["Retrieved"], None]
_ROWS_AT_ONCE = 4096


@contextmanager
def saving_retrieval(
    settings: Settings, evaluation: Evaluation, memory: Any, combine: Any, report: PerplexityReport
) -> Iterator[tuple[Iterable[Any], Keep | None]]:
    """The batches that are to be scored, and what takes their neighbours; the file is whole when the block ends.

    Tokens that the file holds already (of an interrupted command, or all of them) go into the report from there.
    Raises: ValueError or OSError for a file that holds anything else, or where there is no place, before any scoring.
    """
    path = settings.config(BulkConfig).save_retrieval
    if not path:
        yield evaluation.iterator(), None
        return
    from fairseq.memory.retrieval.writer import RetrievalWriter, existing

    made_of = _made_of(settings, evaluation, memory)
    there = existing(path, made_of)
    if there is not None:
        logger.info("%s holds these neighbours already: nothing is searched", path)
        _report_saved(there, len(there), combine, report)
        yield (), None
        return
    near = settings.program == "eval_lm-trime.py" and _reads_text(settings)
    writer = RetrievalWriter(
        path,
        evaluation.num_scored_tokens,
        memory.k,
        num_types=len(evaluation.task.dictionary),
        num_rows=len(memory.store),
        near=near,
        made_of=made_of,
        about=_about(settings, evaluation, memory),
        # What the long-term memory held at that point is gone.
        resume=not settings.given.get("use_long"),
    )
    with writer:
        first = 0
        if writer.rows_done:
            first = _batches_done(evaluation, writer.rows_done)
            logger.info("going on at token %d of %d", writer.rows_done, writer.num_tokens)
            _report_saved(writer.saved(), writer.rows_done, combine, report)

        def keep(part: Retrieved) -> None:
            continues_N = report.continues[part.target_N.cpu().numpy()]
            scored = (part.block_N, part.target_N, continues_N, part.lm_logp_N, part.lm_norm_N)
            writer.append(*scored, part.near, part.found)

        yield evaluation.iterator(first) if first < len(evaluation.batches) else (), keep
        writer.finish()
    figures = {"num_tokens": writer.num_tokens, "k": memory.k, "bytes": os.path.getsize(path)}
    logger.info("%s: %d tokens with %d neighbours each", path, writer.num_tokens, memory.k)
    leave_manifest(settings, evaluation, f"{path}.run.json", figures)


def _report_saved(there: Retrieval, count: int, combine: Any, report: PerplexityReport) -> None:
    """Combine saved tokens as the settings say."""
    from fairseq.memory.datastore.chunked_array import as_tensor

    for start in range(0, count, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, count))
        part = there.part(rows)
        logp_N = combine(part.lm_logp_N, part.lm_norm_N, part.found, part.target_N, part.near)
        report.add(as_tensor(np.array(there.arrays["block"][rows])), part.target_N, logp_N)


def _batches_done(evaluation: Evaluation, rows_done: int) -> int:
    ends = np.cumsum([int(evaluation.dataset.sizes[batch].sum()) for batch in evaluation.batches])
    done = int(np.searchsorted(ends, rows_done))
    assert ends[done] == rows_done, (rows_done, ends[done])
    return done + 1


def _reads_text(settings: Settings) -> bool:
    trime = settings.config(TrimeEvaluationConfig)
    return trime.use_local or trime.use_long


def _made_of(settings: Settings, evaluation: Evaluation, memory: Any) -> dict[str, Any]:
    """What decides which neighbours and log-probabilities come out, as plain values."""
    from fairseq.memory.retrieval.file import store_digest
    from fairseq.runtime.manifest import file_digest

    config, knn = settings.config(EvaluationConfig), settings.config(KnnConfig)
    dictionary, store, index = evaluation.task.dictionary, memory.store, memory.index
    batches = evaluation.batches
    numbers = np.concatenate([[len(batches)], [len(batch) for batch in batches], *batches]).astype(np.int64)
    file = getattr(index, "name", None)
    made_of: dict[str, Any] = {
        "joint": settings.program == "eval_lm-trime.py",
        "subset": config.gen_subset,
        "text_digest": file_digest(evaluation.task.prefix(config.gen_subset) + ".bin"),
        "batches_digest": hashlib.sha256(numbers.tobytes()).hexdigest(),
        "shard": [config.shard_id, config.num_shards],
        "context_window": evaluation.context_window,
        "model_digest": file_digest(str(config.path)),
        "model_dtype": str(next(evaluation.models[0].parameters()).dtype).removeprefix("torch."),
        "model_overrides": repr(sorted((config.model_overrides or {}).items())),
        "key_tap": evaluation.key_tap,
        "dictionary_digest": dictionary.digest(),
        "dictionary_size": len(dictionary),
        "remove_bpe": config.remove_bpe,
        "store_digest": store_digest(store),
        "store_rows": len(store),
        "dim": store.dim,
        "deleted": f"{len(store.deleted)} rows, crc {zlib.crc32(store.deleted.tobytes()):08x}",
        "index": f"{file_digest(file)}, probe {knn.probe}" if file else "exact",
        "metric": index.metric.value,
        "score": memory.score,
        "k": memory.k,
    }
    if made_of["joint"]:
        made_of |= _text_memories(settings)
    return made_of


def _text_memories(settings: Settings) -> dict[str, Any]:
    """What decides the sums of TRIME's other memories, and how the language model scores."""
    trime = settings.config(TrimeEvaluationConfig)
    told: dict[str, Any] = {"use_local": trime.use_local, "use_long": trime.use_long}
    told |= {"mem_size": trime.mem_size, "dedup_memory": trime.dedup_memory, "fix_tail_pads": trime.fix_tail_pads}
    if _reads_text(settings):  # their sums are taken at this temperature
        told["softmax_temp"] = settings.config(KnnConfig).temperature
    return told


def _about(settings: Settings, evaluation: Evaluation, memory: Any) -> dict[str, Any]:
    """The settings that are free to change, and where the files lay."""
    knn, store = settings.config(KnnConfig), memory.store
    config = settings.config(EvaluationConfig)
    about: dict[str, Any] = {
        "program": settings.program,
        "path": os.path.abspath(str(config.path)),
        "dictionary": os.path.abspath(os.path.join(evaluation.task.folders[0], "dict.txt")),
        "store": {
            "prefix": os.path.abspath(store.prefix),
            "key_dtype": store.keys.dtype,
            "described": bool(store.metadata),
        },
        "index": str(getattr(memory.index, "name", "exact")),
        "num_total_tokens": evaluation.num_total_tokens,
        "temperature": knn.temperature,
        "weight": knn.weight,
    }
    if settings.program == "eval_lm-trime.py":
        trime = settings.config(TrimeEvaluationConfig)
        about |= {"mode": trime.mode, "interp_temp": trime.interp_temp}
    return about

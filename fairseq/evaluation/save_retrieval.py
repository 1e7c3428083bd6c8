"""--save-retrieval: every scored token and its neighbours, written while an evaluation runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.evaluation.outputs import write_evaluation_manifest
from fairseq.evaluation.readers import CandidateReader, KeptNeighborsReader

if TYPE_CHECKING:
    from fairseq.data.types import LMBatch
    from fairseq.evaluation.config import EvaluationConfigs, TrimeEvaluationConfig
    from fairseq.evaluation.setup import Evaluation
    from fairseq.memory.combiners.base import Combiner
    from fairseq.memory.retrieval.file import Retrieval
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.types import Candidates, MemoryReader, ScoredPositions
    from fairseq.metrics.perplexity import PerplexityReport

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096


@contextmanager
def saving_retrieval(
    configs: EvaluationConfigs, evaluation: Evaluation, reader: MemoryReader | None, report: PerplexityReport
) -> Iterator[tuple[Iterable[LMBatch], MemoryReader | None]]:
    """The batches to score and the reader to score them with; the file is complete when the block ends.

    Tokens that the file holds already (of an interrupted command, or all of them) go into the report from there.
    Raises: ValueError or OSError for a file that holds anything else, or where there is no place, before any scoring.
    """
    path = configs.bulk.save_retrieval
    if not path:
        yield evaluation.iterator(), reader
        return
    from fairseq.memory.retrieval.writer import RetrievalWriter, existing
    from fairseq.memory.sources.external import ExternalMemory

    if not isinstance(reader, CandidateReader) or not isinstance(reader.source, ExternalMemory):
        raise ValueError(
            "--save-retrieval keeps the neighbours that one search finds for every token, which --retomaton spares: "
            "leave one of them out"
        )
    memory = reader.source
    fingerprint = _fingerprint(configs, evaluation, reader, memory)
    held = existing(path, fingerprint)
    if held is not None:
        logger.info("%s holds these neighbours already: nothing is searched", path)
        _report_saved(held, len(held), reader.combine, report)
        yield (), None
        return
    writer = RetrievalWriter(
        path,
        evaluation.num_scored_tokens,
        memory.k,
        num_types=len(evaluation.task.dictionary),
        num_rows=len(memory.store),
        text_sums=_reads_text(configs.trime),
        fingerprint=fingerprint,
        about=_metadata(configs, evaluation, memory),
        # What the long-term memory held at that point is gone.
        resume=configs.trime is None or not configs.trime.use_long,
    )
    with writer:
        first = 0
        if writer.rows_done:
            first = _batches_done(evaluation, writer.rows_done)
            logger.info("resuming at token %d of %d", writer.rows_done, writer.num_tokens)
            _report_saved(writer.saved(), writer.rows_done, reader.combine, report)

        def record(scored: ScoredPositions, candidates: Candidates) -> None:
            continues_N = report.continues[scored.target_N.cpu().numpy()]
            columns = (scored.block_N, scored.target_N, continues_N, scored.logp_N, scored.norm_N)
            writer.append(*columns, scored.text_sums, candidates)

        batches: Iterable[LMBatch] = evaluation.iterator(first) if first < len(evaluation.batches) else ()
        yield batches, reader.with_record(record)
        writer.finish()
    figures = {"num_tokens": writer.num_tokens, "k": memory.k, "bytes": os.path.getsize(path)}
    logger.info("%s: %d tokens with %d neighbours each", path, writer.num_tokens, memory.k)
    write_evaluation_manifest(configs, evaluation, f"{path}.run.json", figures)


def _report_saved(held: Retrieval, count: int, combine: Combiner, report: PerplexityReport) -> None:
    """Combine saved tokens as the settings say."""
    from fairseq.memory.datastore.chunked_array import as_tensor

    for start in range(0, count, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, count))
        part = held.part(rows)
        logp_N = combine(part.lm_logp_N, part.lm_norm_N, part.found, part.target_N, part.text_sums)
        report.add(as_tensor(np.array(held.arrays["block"][rows])), part.target_N, logp_N)


def _batches_done(evaluation: Evaluation, rows_done: int) -> int:
    ends = np.cumsum([int(evaluation.dataset.sizes[batch].sum()) for batch in evaluation.batches])
    done = int(np.searchsorted(ends, rows_done))
    assert ends[done] == rows_done, (rows_done, ends[done])
    return done + 1


def _reads_text(trime: TrimeEvaluationConfig | None) -> bool:
    return trime is not None and (trime.use_local or trime.use_long)


def _fingerprint(
    configs: EvaluationConfigs, evaluation: Evaluation, reader: CandidateReader, memory: ExternalMemory
) -> dict[str, Any]:
    """Everything that decides which neighbours and log-probabilities come out, as plain values."""
    from fairseq.memory.retrieval.made_of import facts_of_model, facts_of_search, facts_of_text
    from fairseq.runtime.manifest import file_digest

    config, task, sizes = configs.evaluation, evaluation.task, [evaluation.dataset.sizes]
    fingerprint: dict[str, Any] = {
        "joint": configs.trime is not None,
        "subset": config.gen_subset,
        "shard": [config.shard_id, config.num_shards],
        "context_window": evaluation.context_window,
        "remove_bpe": config.remove_bpe,
        **facts_of_text([task.prefix(config.gen_subset)], evaluation.batches, task.dictionary, sizes),
        **facts_of_model(str(config.path), evaluation.models[0], config.model_overrides, evaluation.key_tap),
        **facts_of_search(memory, configs.knn.probe),
        **task.facts(config.gen_subset),
    }
    if configs.decoder.memory_decoder:
        digest = file_digest(configs.decoder.memory_decoder)
        fingerprint |= {"memory_decoder": digest, "decoder_weight": configs.decoder.decoder_weight}
    if isinstance(reader, KeptNeighborsReader):
        fingerprint["neighbors"] = reader.neighbors.digest
    if configs.trime is not None:
        fingerprint |= _text_memories(configs.trime, configs.knn)
    return fingerprint


def _text_memories(trime: TrimeEvaluationConfig, knn: KnnConfig) -> dict[str, Any]:
    """Everything that decides the sums of TRIME's other memories, and how the language model scores."""
    settings: dict[str, Any] = {"use_local": trime.use_local, "use_long": trime.use_long}
    settings |= {"mem_size": trime.mem_size, "dedup_memory": trime.dedup_memory, "fix_tail_pads": trime.fix_tail_pads}
    if _reads_text(trime):  # their sums are taken at this temperature
        settings["softmax_temp"] = knn.temperature
    return settings


def _metadata(configs: EvaluationConfigs, evaluation: Evaluation, memory: ExternalMemory) -> dict[str, Any]:
    """The settings that are free to change, and where the files lay."""
    from fairseq.memory.retrieval.made_of import place_of_store

    config, knn = configs.evaluation, configs.knn
    metadata: dict[str, Any] = {
        "program": configs.command.program,
        "path": os.path.abspath(str(config.path)),
        "dictionary": os.path.abspath(evaluation.task.dictionary_path),
        **place_of_store(memory),
        "num_total_tokens": evaluation.num_total_tokens,
        "temperature": knn.temperature,
        "weight": knn.weight,
    }
    if configs.trime is not None:
        metadata |= {"mode": configs.trime.mode, "interp_temp": configs.trime.interp_temp}
    return metadata

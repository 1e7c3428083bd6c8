"""Score text with a language model: plain, with a datastore (kNN-LM, RetoMaton), or to save a datastore."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fairseq.config import flag_names
from fairseq.evaluation.config import BulkConfig, EvaluationConfig, MemoryEvaluationConfig
from fairseq.evaluation.outputs import checked, leave_files, set_determinism, tell
from fairseq.evaluation.save_retrieval import saving_retrieval
from fairseq.evaluation.store_saving import as_shard_of_torchrun, save
from fairseq.memory.retomaton.config import RetomatonConfig
from fairseq.options import Settings, parse_eval_lm
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.evaluation.setup import Evaluation


def main(argv: Sequence[str]) -> None:
    """Evaluate, or save a datastore, as the words say."""
    settings = parse_eval_lm(argv)
    if settings.config(MemoryEvaluationConfig).save_knnlm_dstore:
        settings = as_shard_of_torchrun(settings)
    checked(settings, MemoryEvaluationConfig, RetomatonConfig)
    _check_memory_wanted(settings)

    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.sequence_scorer import SequenceScorer

    set_determinism(settings)
    config, memory_config = settings.config(EvaluationConfig), settings.config(MemoryEvaluationConfig)
    carries = settings.config(RetomatonConfig).retomaton_carry
    evaluation = open_evaluation(settings, in_order=memory_config.save_knnlm_dstore or carries)
    uses_keys = memory_config.knnlm or memory_config.save_knnlm_dstore
    scorer = SequenceScorer(
        evaluation.models,
        key_tap=evaluation.key_tap if uses_keys else None,
        softmax_batch=config.softmax_batch,
        device=evaluation.device,
    )
    if memory_config.save_knnlm_dstore:
        save(settings, evaluation, scorer)
        return
    memory = combine = None
    if memory_config.knnlm:
        memory, combine = open_memory(settings, evaluation)
    report = PerplexityReport(evaluation.task.dictionary, config.remove_bpe)
    bulk = settings.config(BulkConfig).knn_bulk
    with saving_retrieval(settings, evaluation, memory, combine, report) as (batches, keep):
        seconds = evaluate(scorer, batches, report, memory, combine, bulk, keep)
    figures = report.figures(evaluation.num_total_tokens, seconds)
    if settings.config(RetomatonConfig).retomaton:
        figures = dataclasses.replace(figures, num_searched=memory.num_searched)
    tell(figures)
    leave_files(settings, evaluation, report, figures)


def _check_memory_wanted(settings: Settings) -> None:
    """Raise ValueError where what is given of a memory is not to be used, or lacks what it needs."""
    retomaton = settings.config(RetomatonConfig)
    own = [field for field in dataclasses.fields(RetomatonConfig) if field.name in settings.given]
    if own and not retomaton.retomaton:
        raise ValueError(f"{flag_names(own[0])[0]} belongs to --retomaton: give it too, or leave it out")
    if retomaton.retomaton and not settings.config(MemoryEvaluationConfig).knnlm:
        raise ValueError("--retomaton is a way to find the neighbours of --knnlm: give it and its datastore too")
    if retomaton.clusters and not os.path.isfile(retomaton.clusters):
        raise ValueError(
            f"--clusters: no file at {retomaton.clusters!r}; build_dstore.py --cluster_dstore makes clusters"
        )
    named = [name for name in ("dstore_filename", "indexfile") if settings.given.get(name)]
    if named and not settings.config(MemoryEvaluationConfig).knnlm:
        flag = f"--{named[0].replace('_', '-')}"
        raise ValueError(
            f"{flag} {settings.given[named[0]]} is read with --knnlm only: give it too, or leave {flag} out"
        )
    if settings.config(BulkConfig).save_retrieval and not settings.config(MemoryEvaluationConfig).knnlm:
        raise ValueError("--save-retrieval keeps the neighbours that --knnlm finds: give it too")


def open_memory(settings: Settings, evaluation: Evaluation) -> tuple[Any, Any]:
    """The memory of --knnlm and how it is mixed in; everything about it is checked here."""
    from fairseq.memory.combiners.interpolation import Interpolation
    from fairseq.memory.sources.config import KnnConfig

    knn, retomaton = settings.config(KnnConfig), settings.config(RetomatonConfig)
    memory = open_datastore(settings, evaluation, knn.similarity)
    if retomaton.retomaton:
        from fairseq.memory.retomaton.reader import open_reader

        memory = open_reader(retomaton, memory)
    return memory, Interpolation(knn.weight, knn.temperature)


def open_datastore(settings: Settings, evaluation: Evaluation, score: str) -> Any:
    """The datastore and index the words name, checked against the model; ``score`` as in ExternalMemory."""
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.memory.sources.external import open_external

    tap = evaluation.key_tap
    dictionary = evaluation.task.dictionary
    return open_external(
        settings.config(KnnConfig),
        score=score,
        dim=evaluation.models[0].key_dim(tap),
        key_tap=tap,
        dictionary_digest=dictionary.digest(),
        dictionary_size=len(dictionary),
    )


def cli_main() -> None:
    """Entry point of eval_lm.py and fairseq-eval-lm."""
    run("eval_lm.py", main)


if __name__ == "__main__":
    cli_main()

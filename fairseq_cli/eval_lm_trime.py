"""Score text with a language model and TRIME's memories: local, long-term and external."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fairseq.evaluation.config import BulkConfig, EvaluationConfig, TrimeEvaluationConfig
from fairseq.evaluation.outputs import checked, leave_files, set_determinism, tell
from fairseq.evaluation.save_retrieval import saving_retrieval
from fairseq.memory.sources.config import KnnConfig
from fairseq.options import Settings, parse_eval_lm
from fairseq_cli.entry import run
from fairseq_cli.eval_lm import open_datastore

if TYPE_CHECKING:
    from fairseq.evaluation.setup import Evaluation
    from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Evaluate as the words say."""
    settings = parse_eval_lm(argv, "eval_lm-trime.py")
    checked(settings, TrimeEvaluationConfig)
    trime, config = settings.config(TrimeEvaluationConfig), settings.config(EvaluationConfig)
    check_memories(trime, config, settings.config(KnnConfig))
    if settings.config(BulkConfig).save_retrieval and not trime.use_external:
        raise ValueError("--save-retrieval keeps the neighbours of the external memory: give --use-external too")

    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport

    set_determinism(settings)
    evaluation = open_evaluation(settings, in_order=trime.use_long)
    scorer, memory, combine = open_memories(settings, evaluation)
    report = PerplexityReport(evaluation.task.dictionary, config.remove_bpe)
    bulk = settings.config(BulkConfig).knn_bulk
    with saving_retrieval(settings, evaluation, memory, combine, report) as (batches, keep):
        seconds = evaluate(scorer, batches, report, memory, combine, bulk, keep)
    figures = report.figures(evaluation.num_total_tokens, seconds)
    tell(figures, buckets=True)
    leave_files(settings, evaluation, report, figures)


def check_memories(trime: TrimeEvaluationConfig, config: EvaluationConfig, knn: KnnConfig) -> None:
    """Raise ValueError for memories that do not go together."""
    if trime.use_long and trime.mem_size < config.context_window:
        raise ValueError(
            f"--mem-size {trime.mem_size} is less than --context-window {config.context_window}, so that the long-term "
            "memory reaches no further back than the input; give a larger one, or --use-local alone"
        )
    if knn.weight and not trime.interpolates:
        raise ValueError(f"--lmbda {knn.weight} has no effect without --use-interp; give both or neither")
    if trime.interpolates and not knn.weight:
        logger.warning("--lmbda is 0: the external memory's own distribution is mixed in with no share")
    if trime.use_external and knn.similarity == "index" and knn.faiss_metric_type != "ip":
        words = "--no-load-keys" if knn.no_load_keys else f"--knn-sim-func {knn.knn_sim_func}"
        raise ValueError(
            f"TRIME's similarity is the inner product; an index of metric {knn.faiss_metric_type!r} gives another one: "
            f"leave out {words}, or give an index built with --dist ip and --faiss-metric-type ip"
        )
    if trime.use_long and config.num_shards > 1:
        logger.warning("--num-shards: the long-term memory is empty at the start of every shard")
    if not (trime.use_local or trime.use_long or trime.use_external):
        logger.warning("neither --use-local nor --use-long nor --use-external: the language model alone is evaluated")


def open_memories(settings: Settings, evaluation: Evaluation) -> tuple[SequenceScorer, Any, Any]:
    """The scorer with the memories of the text, the external memory, and how all come together (None for none)."""
    from fairseq.evaluation.trime_compat import score_as_padding
    from fairseq.memory.combiners.joint import JointNormalization
    from fairseq.memory.sources.local import LocalMemory
    from fairseq.memory.sources.rolling import RollingMemory
    from fairseq.sequence_scorer import SequenceScorer, TextMemory

    trime, knn = settings.config(TrimeEvaluationConfig), settings.config(KnnConfig)
    tap = evaluation.key_tap
    sources: list[Any] = [LocalMemory()] if trime.use_local else []
    if trime.use_long:
        sources.append(RollingMemory(trime.mem_size, dedup=trime.dedup_memory))
    has_memory = bool(sources) or trime.use_external
    scorer = SequenceScorer(
        evaluation.models,
        key_tap=tap if has_memory else None,
        softmax_batch=settings.config(EvaluationConfig).softmax_batch,
        device=evaluation.device,
        text_memory=TextMemory(sources, knn.temperature) if sources else None,
        correct=None if trime.fix_tail_pads else score_as_padding,
    )
    if not has_memory:
        return scorer, None, None
    memory = None
    if trime.use_external:
        memory = open_datastore(settings, evaluation, "index" if knn.similarity == "index" else "dot")
    combine = JointNormalization(
        dim=evaluation.models[0].key_dim(tap),
        temperature=knn.temperature,
        with_external=trime.mode != "li",
        weight=knn.weight,
        interpolation_temperature=trime.interp_temp,
    )
    return scorer, memory, combine


def cli_main() -> None:
    """Entry point of eval_lm-trime.py."""
    run("eval_lm-trime.py", main)


if __name__ == "__main__":
    cli_main()

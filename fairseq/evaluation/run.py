"""One evaluation from its configs to its figures: what eval_lm.py, eval_lm-trime.py and build_dstore.py share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from fairseq.evaluation.loop import evaluate
from fairseq.evaluation.memories import open_reader
from fairseq.evaluation.save_retrieval import saving_retrieval
from fairseq.evaluation.setup import open_evaluation
from fairseq.metrics.perplexity import PerplexityReport

if TYPE_CHECKING:
    from fairseq.evaluation.config import EvaluationConfigs
    from fairseq.evaluation.setup import Evaluation
    from fairseq.metrics.perplexity import Figures
    from fairseq.runtime.config import RuntimeConfig


def run_evaluation(configs: EvaluationConfigs) -> tuple[Evaluation, PerplexityReport, Figures]:
    """Open model, text and memories, score the split, and sum up.

    Raises: ValueError or OSError when anything does not fit, before any model runs.
    """
    set_determinism(configs.runtime)
    in_order = configs.trime.use_long if configs.trime is not None else configs.retomaton.retomaton_carry
    evaluation = open_evaluation(configs, in_order=in_order)
    scorer, reader = open_reader(configs, evaluation)
    report = PerplexityReport(evaluation.task.dictionary, configs.evaluation.remove_bpe)
    prover = None
    if configs.proof.is_on:
        from fairseq.evaluation.prove import EvaluationProver

        prover = EvaluationProver(configs.proof, evaluation, scorer, reader, configs.runtime.seed)
    with saving_retrieval(configs, evaluation, reader, report) as (batches, reading):
        seconds = evaluate(scorer, batches, report, reading, configs.bulk.knn_bulk, prover)
    seconds -= 0.0 if prover is None else prover.budget.seconds
    figures = report.figures(evaluation.num_total_tokens, seconds)
    if reader is not None:
        figures = dataclasses.replace(figures, num_searched=reader.num_searched)
    if prover is not None:
        figures = dataclasses.replace(figures, proof=prover.finish(report))
    return evaluation, report, figures


def set_determinism(runtime: RuntimeConfig) -> None:
    """Seed all random numbers, and forbid kernels that vary from run to run where --deterministic asks for it."""
    torch.manual_seed(runtime.seed)
    if runtime.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)

"""Figures of an evaluation: computed, printed, and written into the output folder."""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from script_arguments import KnnArguments, ModelArguments, TextArguments
from torch import Tensor
from transformers import TrainingArguments

from fairseq.evaluation.outputs import print_report
from fairseq.hf.knn.evaluation import TokenScores
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.metrics.perplexity import Figures
from fairseq.metrics.verdicts import Proof
from fairseq.runtime.atomic_files import writing
from fairseq.runtime.files import read_json, write_json
from fairseq.runtime.manifest import write_manifest

logger = logging.getLogger(__name__)


def perplexity_figures(scores: TokenScores, num_tokens: int, memory: Any) -> dict[str, Any]:
    """Print the perplexity, with a memory also that of the model alone; returns the figures."""
    loss, counted = _mean_loss(scores.logp)
    figures = Figures(loss / math.log(2), math.exp(loss), len(scores.logp), counted, num_tokens, scores.seconds)
    print_report(figures)
    told = {name: value for name, value in figures.to_dict().items() if name != "buckets"} | {"eval_loss": loss}
    if memory is not None:
        told |= {"lm_perplexity": math.exp(_mean_loss(scores.lm_logp)[0])}
        sys.stdout.write(f"Perplexity of the model alone: {told['lm_perplexity']:.2f}\n")
    return told


def _mean_loss(logp_N: Tensor) -> tuple[float, int]:
    """Mean of -log p over tokens that have a probability, and their number."""
    logp = logp_N.double().numpy()
    impossible = np.isneginf(logp)
    if impossible.any():
        logger.warning("%d tokens have probability 0 and are left out of the perplexity", impossible.sum())
    return -float(logp[~impossible].mean()), len(logp) - int(impossible.sum())


def search_counts(memory: Any) -> tuple[int, int]:
    """Positions and searches of a RetoMaton so far; zeros for anything else."""
    return (memory.num_positions, memory.num_searched) if isinstance(memory, RetomatonWrapper) else (0, 0)


def search_figures(memory: Any, before: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Print the share of searches that a RetoMaton saved since ``before``; no figures for anything else."""
    if not isinstance(memory, RetomatonWrapper):
        return {}
    positions, searched = (now - then for now, then in zip(search_counts(memory), before))
    saved_share = 1.0 - searched / max(1, positions)
    sys.stdout.write(f"saved {100 * saved_share:.2f}% of the searches\n")
    return {"saved_share": saved_share, "num_searched": searched}


def proof_figures(proof: Proof | None) -> dict[str, Any]:
    """Print the verdicts of --prove; no figures without it."""
    if proof is None:
        return {}
    sys.stdout.writelines(f"{line}\n" for line in proof.lines())
    return {"proof": proof.to_dict()}


def peak_memory() -> dict[str, float]:
    """The most memory this process has used."""
    return {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def save_scores(path: str, scores: TokenScores) -> None:
    """Write log-probability and token of each scored position."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with writing(path, binary=True) as file:
        np.savez(file, logprob=scores.logp.numpy().astype(np.float32), target=scores.targets.numpy().astype(np.int32))


def write_results(name: str, told: dict[str, Any], training: TrainingArguments) -> None:
    """Write ``<name>_results.json`` and add to ``all_results.json``."""
    folder = Path(str(training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    everything = folder / "all_results.json"
    write_json(folder / f"{name}_results.json", told)
    write_json(everything, (read_json(everything) if everything.exists() else {}) | told)


def write_run(
    name: str,
    program: str,
    argv: Sequence[str],
    options: tuple[ModelArguments, TextArguments, KnnArguments, TrainingArguments],
    told: dict[str, Any],
) -> None:
    """Write the manifest ``<name>.run.json``."""
    chosen, data, knn, training = options
    write_manifest(
        Path(str(training.output_dir)) / f"{name}.run.json",
        program=program,
        argv=argv,
        config={"model": asdict(chosen), "data": asdict(data), "memory": asdict(knn)},
        figures=told,
        inputs=data.all_paths(),
        seed=training.seed,
    )

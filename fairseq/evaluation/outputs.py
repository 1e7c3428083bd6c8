"""The outputs of an evaluation: the printed report, files for scores and figures, and the run manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from fairseq.config import shard_suffix

if TYPE_CHECKING:
    from fairseq.evaluation.config import EvaluationConfigs
    from fairseq.evaluation.setup import Evaluation
    from fairseq.metrics.perplexity import Figures, PerplexityReport

logger = logging.getLogger(__name__)


def print_report(figures: Figures, *, buckets: bool = False, positions: bool = False) -> None:
    """Print the report; scripts read the first two lines.

    Args:
        buckets: add a line for each range of training counts.
        positions: add a line for each range of places in a block.
    """
    share = 100.0 * figures.num_tokens / figures.num_total_tokens
    sys.stdout.write(
        f"Evaluated {figures.num_tokens} tokens in {figures.seconds:.1f}s ({figures.tokens_per_second:.2f} tokens/s)\n"
        f"Loss (base 2): {figures.loss_base2:.4f}, Perplexity: {figures.perplexity:.2f}\n"
        f"scored {figures.num_tokens} of {figures.num_total_tokens} tokens ({share:.2f}%)\n"
    )
    if figures.num_searched is not None:
        saved = 100.0 * (1.0 - figures.num_searched / figures.num_tokens)
        sys.stdout.write(f"searched {figures.num_searched} of {figures.num_tokens} tokens (saved {saved:.2f}%)\n")
    for line in figures.proof.lines() if figures.proof is not None else ():
        sys.stdout.write(f"{line}\n")
    for row in figures.buckets if buckets else ():
        upper = f"to {row['count_below'] - 1}" if row["count_below"] else "or more"
        seen = "special symbols" if row["special"] else f"seen {row['count_from']} {upper} times in training"
        sys.stdout.write(f"{seen}: {row['num_tokens']} tokens, perplexity {row['perplexity']:.2f}\n")
    for row in figures.positions if positions else ():
        places = f"place {row['first']}" if row["first"] == row["last"] else f"places {row['first']} to {row['last']}"
        sys.stdout.write(f"{places} of a block: {row['num_tokens']} tokens, perplexity {row['perplexity']:.2f}\n")


def write_outputs(
    configs: EvaluationConfigs, evaluation: Evaluation, report: PerplexityReport, figures: Figures
) -> None:
    """Write the files the user asked for, and the run manifest."""
    import numpy as np

    from fairseq.runtime.atomic_files import replacing, write_atomically

    config, program = configs.evaluation, configs.command.program
    eval_file, scores_file = config.eval_file, config.scores_file
    if config.results_path:
        part = f"{config.gen_subset}{shard_suffix(config.shard_id, config.num_shards)}"
        eval_file = eval_file or os.path.join(config.results_path, f"{os.path.splitext(program)[0]}-{part}.json")
        scores_file = scores_file or os.path.join(config.results_path, f"scores-{part}.npz")
    if eval_file:
        write_atomically(eval_file, json.dumps(figures.to_dict(), indent=1) + "\n")
    if scores_file:
        block, token, logp = report.arrays()
        with replacing(scores_file) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, block=block, target=token, logp=logp)
    if config.output_word_probs and not config.quiet:
        for number, words in report.words():
            line = "\t".join(f"{word} [{logp:.6f}]" for word, logp in words)
            sys.stdout.write(f"{number} {line}\n")
    if config.output_word_stats:
        for row in report.word_statistics():
            sys.stdout.write("\t".join(map(str, row)) + "\n")
    path = f"{eval_file or scores_file}.run.json" if eval_file or scores_file else _default_manifest(configs)
    write_evaluation_manifest(configs, evaluation, path, figures.to_dict())


def _default_manifest(configs: EvaluationConfigs) -> str | None:
    """Beside the checkpoint, one file per distinct command; None where that folder is not ours to write in."""
    from fairseq.runtime.atomic_files import may_write_in

    config, command = configs.evaluation, configs.command
    folder = os.path.dirname(os.path.abspath(str(config.path).split(":")[0]))
    if not may_write_in(folder):
        logger.info("no run manifest: %s cannot be written; --eval-file or --results-path gives it a place", folder)
        return None
    name = os.path.splitext(command.program)[0]
    key = hashlib.sha256("\0".join(command.argv).encode()).hexdigest()[:10]
    return os.path.join(folder, "runs", f"{name}-{config.gen_subset}-{key}.run.json")


def begin_manifest(configs: EvaluationConfigs) -> None:
    """Take the digests of the large inputs while the program still loads; see ``runtime.manifest.begin_digests``."""
    from fairseq.memory.datastore.layout import KEY_DTYPES, StoreFiles
    from fairseq.runtime.manifest import begin_digests

    knn, paths = configs.knn, str(configs.evaluation.path).split(":")
    if knn.dstore_filename:
        names = [StoreFiles.of(knn.dstore_filename, dtype) for dtype in KEY_DTYPES]
        paths += [str(path) for each in names for path in (each.keys, each.values)]
    begin_digests(path for path in dict.fromkeys([*paths, knn.indexfile]) if path and os.path.isfile(path))


def write_evaluation_manifest(
    configs: EvaluationConfigs, evaluation: Evaluation, path: str | None, figures: dict[str, Any]
) -> None:
    """Write the run manifest to ``path``, or none where there is no place for it."""
    from fairseq.runtime.manifest import write_manifest

    if path is None:
        return
    config, knn, command = configs.evaluation, configs.knn, configs.command
    prefix = evaluation.task.prefix(config.gen_subset)
    named = [*str(config.path).split(":"), prefix + ".bin", prefix + ".idx", knn.dstore_filename, knn.indexfile]
    named += [configs.retomaton.clusters, configs.decoder.memory_decoder]
    if knn.dstore_filename:
        from fairseq.memory.datastore.metadata import store_files

        named += map(str, store_files(knn.dstore_filename))
    write_manifest(
        path,
        program=command.program,
        argv=command.argv,
        config=dict(command.given) | {"checkpoint": evaluation.checkpoint.config},
        figures=figures,
        inputs=[name for name in named if name and os.path.isfile(name)],
        seed=configs.runtime.seed,
    )

"""What eval_lm.py and eval_lm-trime.py share: checks before anything is loaded, the report and the files it leaves."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq.evaluation.setup import Evaluation
    from fairseq.metrics.perplexity import Figures, PerplexityReport
    from fairseq.options import Settings

logger = logging.getLogger(__name__)


def checked(settings: Settings, *own: type) -> None:
    """Make every config of the command, so that each impossible value is told before anything is loaded."""
    from fairseq.data.batching_config import DatasetConfig
    from fairseq.evaluation.config import BulkConfig, EvaluationConfig
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.runtime.atomic_files import require_writable
    from fairseq.runtime.config import RuntimeConfig

    for config_class in (*own, BulkConfig, KnnConfig, RuntimeConfig, DatasetConfig):
        settings.config(config_class)
    config = settings.config(EvaluationConfig)
    for path in str(config.path).split(":"):
        if not os.path.exists(path):
            raise ValueError(f"--path: no checkpoint at {path!r}")
        if os.path.isdir(path):
            raise ValueError(f"--path {path} is a folder; name one of its checkpoints, such as checkpoint_best.pt")
    files = (("--eval-file", config.eval_file), ("--scores-file", config.scores_file))
    for flag, name in (*files, ("--save-retrieval", settings.config(BulkConfig).save_retrieval)):
        if name and os.path.isdir(name):
            raise ValueError(f"{flag} {name} is a folder; give the name of a file")
        if name:
            require_writable(os.path.dirname(os.path.abspath(name)), flag)
    if config.results_path:
        require_writable(config.results_path, "--results-path")


def set_determinism(settings: Settings) -> None:
    """Seed all random numbers, and forbid kernels that vary from run to run where --deterministic asks for it."""
    import torch

    torch.manual_seed(settings.given.get("seed", 1))
    if settings.given.get("deterministic"):
        torch.use_deterministic_algorithms(True, warn_only=True)


def tell(figures: Figures, *, buckets: bool = False) -> None:
    """Print the report; scripts read the first two lines. ``buckets`` adds a line per range of training counts."""
    share = 100.0 * figures.num_tokens / figures.num_total_tokens
    sys.stdout.write(
        f"Evaluated {figures.num_tokens} tokens in {figures.seconds:.1f}s ({figures.tokens_per_second:.2f} tokens/s)\n"
        f"Loss (base 2): {figures.loss_base2:.4f}, Perplexity: {figures.perplexity:.2f}\n"
        f"scored {figures.num_tokens} of {figures.num_total_tokens} tokens ({share:.2f}%)\n"
    )
    if figures.num_searched is not None:
        saved = 100.0 * (1.0 - figures.num_searched / figures.num_tokens)
        sys.stdout.write(f"searched {figures.num_searched} of {figures.num_tokens} tokens (saved {saved:.2f}%)\n")
    for row in figures.buckets if buckets else ():
        upper = f"to {row['count_below'] - 1}" if row["count_below"] else "or more"
        seen = "special symbols" if row["special"] else f"seen {row['count_from']} {upper} times in training"
        sys.stdout.write(f"{seen}: {row['num_tokens']} tokens, perplexity {row['perplexity']:.2f}\n")


def leave_files(settings: Settings, evaluation: Evaluation, report: PerplexityReport, figures: Figures) -> None:
    """Write what was asked for, and the run manifest."""
    import numpy as np

    from fairseq.evaluation.config import EvaluationConfig
    from fairseq.runtime.atomic_files import replacing, write_atomically

    config = settings.config(EvaluationConfig)
    eval_file, scores_file = config.eval_file, config.scores_file
    if config.results_path:
        os.makedirs(config.results_path, exist_ok=True)
        eval_file = eval_file or os.path.join(
            config.results_path, f"{os.path.splitext(settings.program)[0]}-{config.gen_subset}.json"
        )
        scores_file = scores_file or os.path.join(config.results_path, f"scores-{config.gen_subset}.npz")
    if eval_file:
        write_atomically(eval_file, json.dumps(figures.to_dict(), indent=1) + "\n")
    if scores_file:
        os.makedirs(os.path.dirname(os.path.abspath(scores_file)), exist_ok=True)
        block, token, logp = report.arrays()
        with replacing(scores_file) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, block=block, target=token, logp=logp)
    if config.output_word_probs and not config.quiet:
        for block, words in report.words():
            line = "\t".join(f"{word} [{logp:.2f}]" for word, logp in words)
            sys.stdout.write(f"{block} {line}\n")
    if config.output_word_stats:
        sys.stdout.write("word\tcount\tmean_logp\tmean_next_logp\n")
        for word, count, logp, following in report.word_statistics():
            sys.stdout.write(f"{word}\t{count}\t{logp:.4f}\t{following:.4f}\n")
    path = f"{eval_file or scores_file}.run.json" if eval_file or scores_file else _default_manifest(settings, config)
    leave_manifest(settings, evaluation, path, figures.to_dict())


def _default_manifest(settings: Settings, config: Any) -> str | None:
    """Beside the checkpoint, one file per distinct command; None where that folder is not ours to write in."""
    from fairseq.runtime.atomic_files import may_write_in

    folder = os.path.dirname(os.path.abspath(str(config.path).split(":")[0]))
    if not may_write_in(folder):
        logger.info("no run manifest: %s cannot be written; --eval-file or --results-path gives it a place", folder)
        return None
    name = os.path.splitext(settings.program)[0]
    key = hashlib.sha256("\0".join(settings.argv).encode()).hexdigest()[:10]
    return os.path.join(folder, "runs", f"{name}-{config.gen_subset}-{key}.run.json")


def leave_manifest(settings: Settings, evaluation: Evaluation, path: str | None, figures: dict[str, Any]) -> None:
    """Write the run manifest to ``path``, or none where there is no place for it."""
    from fairseq.evaluation.config import EvaluationConfig
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.runtime.manifest import write_manifest

    if path is None:
        return
    config = settings.config(EvaluationConfig)
    knn = settings.config(KnnConfig)
    prefix = evaluation.task.prefix(config.gen_subset)
    named = [*str(config.path).split(":"), prefix + ".bin", prefix + ".idx", knn.dstore_filename, knn.indexfile]
    named.append(settings.given.get("clusters"))
    named += [
        f"{knn.dstore_filename}{end}" for end in ("_keys.npy", "-fp16_keys.npy", "-bf16_keys.npy", "_vals.npy", ".json")
    ]
    write_manifest(
        path,
        program=settings.program,
        argv=settings.argv,
        config=dict(settings.given) | {"checkpoint": evaluation.checkpoint.config},
        figures=figures,
        inputs=[name for name in named if name and os.path.isfile(name)],
        seed=settings.given.get("seed", 1),
    )

"""Score text with a language model: plain, with a datastore (kNN-LM), or to save a datastore."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fairseq.options import Settings, parse_eval_lm
from fairseq_cli.main import run

if TYPE_CHECKING:
    from fairseq.evaluation import Evaluation
    from fairseq.perplexity import Figures, PerplexityReport

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Evaluate, or save a datastore, as the words say."""
    settings = parse_eval_lm(argv)
    configs = _check(settings)

    from fairseq.evaluation import evaluate, open_evaluation
    from fairseq.perplexity import PerplexityReport
    from fairseq.sequence_scorer import SequenceScorer

    _set_determinism(settings)
    config, memory_config = configs["evaluation"], configs["memory"]
    evaluation = open_evaluation(settings, in_order=memory_config.save_knnlm_dstore)
    uses_keys = memory_config.knnlm or memory_config.save_knnlm_dstore
    scorer = SequenceScorer(
        evaluation.models,
        key_tap=_key_tap(evaluation) if uses_keys else None,
        softmax_batch=config.softmax_batch,
        device=evaluation.device,
    )
    if memory_config.save_knnlm_dstore:
        _save(settings, evaluation, scorer)
        return
    memory = combine = None
    if memory_config.knnlm:
        memory, combine = open_memory(settings, evaluation)
    report = PerplexityReport(evaluation.task.dictionary, config.remove_bpe)
    seconds = evaluate(scorer, evaluation.iterator(), report, memory, combine, memory_config.knn_bulk)
    figures = report.figures(evaluation.num_total_tokens, seconds)
    _tell(figures)
    _leave_files(settings, evaluation, report, figures)


def _check(settings: Settings) -> dict[str, Any]:
    """All configs of the command, so that every impossible value is told before anything is loaded."""
    from fairseq.evaluation_config import EvaluationConfig, MemoryEvaluationConfig
    from fairseq.memory.knn_config import KnnConfig
    from fairseq.training_config import DatasetConfig, RuntimeConfig

    configs = {
        "evaluation": settings.config(EvaluationConfig),
        "memory": settings.config(MemoryEvaluationConfig),
        "knn": settings.config(KnnConfig),
        "runtime": settings.config(RuntimeConfig),
        "dataset": settings.config(DatasetConfig),
    }
    for path in str(configs["evaluation"].path).split(":"):
        if not os.path.exists(path):
            raise ValueError(f"--path: no checkpoint at {path!r}")
    return configs


def _set_determinism(settings: Settings) -> None:
    import torch

    torch.manual_seed(settings.given.get("seed", 1))
    if settings.given.get("deterministic"):
        torch.use_deterministic_algorithms(True, warn_only=True)


def _key_tap(evaluation: Evaluation) -> str:
    return evaluation.models[0].config.knn_keytype or "last_ffn_input"


def open_memory(settings: Settings, evaluation: Evaluation) -> tuple[Any, Any]:
    """The memory of --knnlm and how it is mixed in; everything about it is checked here."""
    from fairseq.memory.combiners.fixed import Interpolation
    from fairseq.memory.knn_config import KnnConfig
    from fairseq.memory.sources.external import open_external

    knn = settings.config(KnnConfig)
    tap = _key_tap(evaluation)
    dictionary = evaluation.task.dictionary
    memory = open_external(
        knn,
        dim=evaluation.models[0].key_dim(tap),
        key_tap=tap,
        dictionary_digest=dictionary.digest(),
        dictionary_size=len(dictionary),
    )
    return memory, Interpolation(knn.weight, knn.temperature)


def _save(settings: Settings, evaluation: Evaluation, scorer: Any) -> None:
    """Write the datastore and print how it went."""
    from fairseq.datastore_saving import num_rows, save_datastore
    from fairseq.evaluation_config import EvaluationConfig, MemoryEvaluationConfig
    from fairseq.manifest import file_digest
    from fairseq.memory.datastore import DatastoreWriter
    from fairseq.memory.knn_config import KnnConfig

    memory_config = settings.config(MemoryEvaluationConfig)
    knn = settings.config(KnnConfig)
    config = settings.config(EvaluationConfig)
    tap = _key_tap(evaluation)
    dictionary = evaluation.task.dictionary
    prefix = str(memory_config.dstore_mmap)
    writer = DatastoreWriter(
        prefix,
        num_rows=num_rows(evaluation, knn.dstore_size),
        dim=evaluation.models[0].key_dim(tap),
        dtype="float16" if knn.dstore_fp16 else "float32",
        metadata={
            "key_tap": tap,
            "context_window": evaluation.context_window,
            "subset": config.gen_subset,
            "model_digest": file_digest(str(config.path)),
            "dictionary_digest": dictionary.digest(),
            "dictionary_size": len(dictionary),
            "text_digest": file_digest(evaluation.task.prefix(config.gen_subset) + ".bin"),
            "batches": len(evaluation.batches),
            "with_scores": memory_config.score_while_saving,
        },
    )
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
    _manifest(settings, evaluation, f"{prefix}.run.json", figures)


def _tell(figures: Figures) -> None:
    """Print the report; scripts read the first two lines."""
    share = 100.0 * figures.num_tokens / figures.num_total_tokens
    sys.stdout.write(
        f"Evaluated {figures.num_tokens} tokens in {figures.seconds:.1f}s ({figures.tokens_per_second:.2f} tokens/s)\n"
        f"Loss (base 2): {figures.loss_base2:.4f}, Perplexity: {figures.perplexity:.2f}\n"
        f"scored {figures.num_tokens} of {figures.num_total_tokens} tokens ({share:.2f}%)\n"
    )


def _leave_files(settings: Settings, evaluation: Evaluation, report: PerplexityReport, figures: Figures) -> None:
    """Write what was asked for, and the run manifest."""
    import numpy as np

    from fairseq.evaluation_config import EvaluationConfig
    from fairseq.manifest import write_atomically

    config = settings.config(EvaluationConfig)
    eval_file, scores_file = config.eval_file, config.scores_file
    if config.results_path:
        os.makedirs(config.results_path, exist_ok=True)
        eval_file = eval_file or os.path.join(config.results_path, f"eval_lm-{config.gen_subset}.json")
        scores_file = scores_file or os.path.join(config.results_path, f"scores-{config.gen_subset}.npz")
    if eval_file:
        write_atomically(eval_file, json.dumps(figures.to_dict(), indent=1) + "\n")
    if scores_file:
        block, token, logp = report.arrays()
        aside = scores_file + ".tmp.npz"
        np.savez_compressed(aside, block=block, target=token, logp=logp)
        os.replace(aside, scores_file)
    if config.output_word_probs and not config.quiet:
        for block, words in report.words():
            line = "\t".join(f"{word} [{logp:.2f}]" for word, logp in words)
            sys.stdout.write(f"{block} {line}\n")
    if config.output_word_stats:
        sys.stdout.write("word\tcount\tmean_logp\tmean_next_logp\n")
        for word, count, logp, following in report.word_statistics():
            sys.stdout.write(f"{word}\t{count}\t{logp:.4f}\t{following:.4f}\n")
    path = f"{eval_file or scores_file}.run.json" if eval_file or scores_file else _default_manifest(settings, config)
    _manifest(settings, evaluation, path, figures.to_dict())


def _default_manifest(settings: Settings, config: Any) -> str | None:
    """Beside the checkpoint, one file per distinct command; None where that folder is not ours to write in."""
    from fairseq.manifest import may_write_in

    folder = os.path.dirname(os.path.abspath(str(config.path).split(":")[0]))
    if not may_write_in(folder):
        logger.info("no run manifest: %s cannot be written; --eval-file or --results-path gives it a place", folder)
        return None
    key = hashlib.sha256("\0".join(settings.argv).encode()).hexdigest()[:10]
    return os.path.join(folder, "runs", f"eval_lm-{config.gen_subset}-{key}.run.json")


def _manifest(settings: Settings, evaluation: Evaluation, path: str | None, figures: dict[str, Any]) -> None:
    from fairseq.evaluation_config import EvaluationConfig
    from fairseq.manifest import write_manifest
    from fairseq.memory.knn_config import KnnConfig

    if path is None:
        return
    config = settings.config(EvaluationConfig)
    knn = settings.config(KnnConfig)
    prefix = evaluation.task.prefix(config.gen_subset)
    named = [*str(config.path).split(":"), prefix + ".bin", prefix + ".idx", knn.dstore_filename, knn.indexfile]
    named += [f"{knn.dstore_filename}{end}" for end in ("_keys.npy", "-fp16_keys.npy", "_vals.npy", ".json")]
    write_manifest(
        path,
        program=settings.program,
        argv=settings.argv,
        config=dict(settings.given) | {"checkpoint": evaluation.checkpoint.config},
        figures=figures,
        inputs=[name for name in named if name and os.path.isfile(name)],
        seed=settings.given.get("seed", 1),
    )


def cli_main() -> None:
    """Entry point of eval_lm.py and fairseq-eval-lm."""
    run("eval_lm.py", main)


if __name__ == "__main__":
    cli_main()

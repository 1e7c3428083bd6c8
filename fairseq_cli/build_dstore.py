"""Build a faiss index over a datastore that eval_lm.py --save-knnlm-dstore wrote."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq_cli import cluster_dstore
from fairseq_cli.entry import run

PROGRAM = "build_dstore.py"


def main(argv: Sequence[str]) -> None:
    """Build the index the words describe, print what it is worth and leave a run manifest beside the index."""
    parser = FlagParser(PROGRAM, "Build an index over the keys of a datastore, or clusters of them.")
    parser.add_config(BuildConfig)
    parser.add_config(ClusterConfig)
    given = parser.parse(argv)
    if cluster_dstore.is_wanted(given):
        cluster_dstore.cluster(build(ClusterConfig, given), argv, PROGRAM)
        return
    config = build(BuildConfig, given)

    from fairseq.memory.index.build.build import build_index
    from fairseq.memory.index.build.preflight import open_store
    from fairseq.memory.index.build.quality import report
    from fairseq.runtime.manifest import write_manifest

    _check_evaluation(config)
    built = build_index(config)
    store = open_store(config)
    factory = config.factory(store.dim)
    if built.missing:
        sys.stdout.write(
            f"encoded {built.rows} keys, part {config.shard_id} of {config.num_shards} ({factory}, {config.dist}): "
            f"{built.path}; to be encoded yet: {', '.join(map(str, built.missing))}\n"
        )
        return
    seconds = built.train_seconds + built.add_seconds
    sys.stdout.write(
        f"indexed {built.rows} keys in {seconds:.1f}s ({factory}, {config.dist}, {built.bytes} bytes): {built.path}\n"
    )
    figures: dict[str, Any] = {"rows": built.rows, "dim": store.dim, "index_bytes": built.bytes}
    figures |= {"train_seconds": built.train_seconds, "add_seconds": built.add_seconds}
    if not config.no_report:
        figures["report"] = report(config, store, built)
        _tell(figures["report"])
    if config.report_evaluation:
        figures["evaluation"] = _evaluations(config)
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures["evaluation"].items())
        sys.stdout.write(f"perplexity: {told}\n")
    write_manifest(
        f"{built.path}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures=figures,
        inputs=store.keys.files,
        seed=config.seed,
    )


def _tell(figures: dict[str, Any]) -> None:
    kind = "held-back keys" if figures["held_back"] else "keys (training saw all of them)"
    sys.stdout.write(f"{figures['bytes_per_key']:.1f} bytes per key; {figures['queries']} {kind} as queries:\n")
    for line in figures.get("probes", ()):
        sys.stdout.write(
            f"  probe {line['probe']}: recall@{figures['k']} {line['recall']:.4f}, "
            f"{line['queries_per_second']:.0f} queries/s\n"
        )


def _check_evaluation(config: BuildConfig) -> None:
    """Raise ValueError for words of an evaluation that cannot work, before the build."""
    if config.report_evaluation:
        for words in _commands(config).values():
            _settings(words)


def _commands(config: BuildConfig) -> dict[str, list[str]]:
    """The words of the evaluations: without neighbours, with the true ones, with those of the index."""
    given = shlex.split(str(config.report_evaluation))
    store = ["--knnlm", "--dstore-filename", config.dstore_mmap, "--faiss-metric-type", config.dist]
    for name, value in (("--dstore-size", config.dstore_size),):
        store += [name, str(value)] if value is not None else []
    store += [name for name, on in (("--dstore-fp16", config.dstore_fp16), ("--dstore-bf16", config.dstore_bf16)) if on]
    index = ["--indexfile", config.faiss_index, "--probe", str(config.probe)]
    exact = [*given, *store]
    return {"exact": exact, "index": [*exact, *index]}


def _settings(words: Sequence[str]) -> Any:
    from fairseq.evaluation.config import EvaluationConfig
    from fairseq.memory.sources.config import KnnConfig
    from fairseq.options import parse_eval_lm

    settings = parse_eval_lm(words)
    settings.config(EvaluationConfig)
    if settings.config(KnnConfig).weight == 0.0:
        raise ValueError("--report_evaluation: --lmbda is 0, so that neighbours do not count; give --lmbda 0.25, say")
    return settings


def _evaluations(config: BuildConfig) -> dict[str, float]:
    """Perplexities with exact search and with the index, and their difference."""
    from fairseq.evaluation.config import BulkConfig, EvaluationConfig
    from fairseq.evaluation.loop import evaluate
    from fairseq.evaluation.setup import open_evaluation
    from fairseq.metrics.perplexity import PerplexityReport
    from fairseq.sequence_scorer import SequenceScorer
    from fairseq_cli.eval_lm import open_memory

    found: dict[str, float] = {}
    for name, words in _commands(config).items():
        settings = _settings(words)
        opened = open_evaluation(settings, in_order=False)
        chosen = settings.config(EvaluationConfig)
        scorer = SequenceScorer(
            opened.models, key_tap=opened.key_tap, softmax_batch=chosen.softmax_batch, device=opened.device
        )
        scored = PerplexityReport(opened.task.dictionary, chosen.remove_bpe)
        memory, combine = open_memory(settings, opened)
        seconds = evaluate(scorer, opened.iterator(), scored, memory, combine, settings.config(BulkConfig).knn_bulk)
        found[name] = float(scored.figures(opened.num_total_tokens, seconds).perplexity)
    return found | {"gap": found["index"] - found["exact"]}


def cli_main() -> None:
    """Entry point of build_dstore.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

"""Build a faiss index over a datastore, or clusters of its rows for RetoMaton (--cluster_dstore)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fairseq.config import FlagParser, build, flag_names, to_dict
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq_cli.entry import run

if TYPE_CHECKING:
    from fairseq.evaluation.config import EvaluationConfigs

PROGRAM = "build_dstore.py"


def main(argv: Sequence[str]) -> None:
    """Build an index or clusters, print its recall and write a run manifest beside it."""
    parser = FlagParser(PROGRAM, "Build an index over the keys of a datastore, or clusters of them.")
    parser.add_config(BuildConfig)
    parser.add_config(ClusterConfig)
    given = parser.parse(argv)
    if _makes_clusters(given):
        cluster(build(ClusterConfig, given), argv)
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
        _print_report(figures["report"])
    if config.report_evaluation:
        figures["evaluation"] = _evaluations(config)
        perplexities = ", ".join(f"{name} {value:.4f}" for name, value in figures["evaluation"].items())
        sys.stdout.write(f"perplexity: {perplexities}\n")
    write_manifest(
        f"{built.path}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures=figures,
        inputs=store.keys.files,
        seed=config.seed,
    )


def _print_report(figures: dict[str, Any]) -> None:
    kind = "held-back keys" if figures["held_back"] else "keys (training saw all of them)"
    sys.stdout.write(f"{figures['bytes_per_key']:.1f} bytes per key; {figures['queries']} {kind} as queries:\n")
    for line in figures.get("probes", ()):
        sys.stdout.write(
            f"  probe {line['probe']}: recall@{figures['k']} {line['recall']:.4f}, "
            f"{line['queries_per_second']:.0f} queries/s\n"
        )


def _check_evaluation(config: BuildConfig) -> None:
    """Raise ValueError for arguments of an evaluation that cannot work, before the build."""
    if config.report_evaluation:
        for words in _commands(config).values():
            _configs(words)


def _commands(config: BuildConfig) -> dict[str, list[str]]:
    """Arguments of the evaluations: with the true neighbours and with those of the index."""
    given = shlex.split(str(config.report_evaluation))
    store = ["--knnlm", "--dstore-filename", config.dstore_mmap, "--faiss-metric-type", config.dist]
    for name, value in (("--dstore-size", config.dstore_size),):
        store += [name, str(value)] if value is not None else []
    store += [name for name, on in (("--dstore-fp16", config.dstore_fp16), ("--dstore-bf16", config.dstore_bf16)) if on]
    index = ["--indexfile", config.faiss_index, "--probe", str(config.probe)]
    exact = [*given, *store]
    return {"exact": exact, "index": [*exact, *index]}


def _configs(words: Sequence[str]) -> EvaluationConfigs:
    from fairseq.evaluation.memories import check_knn
    from fairseq.options import evaluation_configs, parse_eval_lm

    configs = evaluation_configs(parse_eval_lm(words))
    if configs.knn.weight == 0.0:
        raise ValueError("--report_evaluation: --lmbda is 0, so that neighbours do not count; give --lmbda 0.25, say")
    check_knn(configs)
    return configs


def _evaluations(config: BuildConfig) -> dict[str, float]:
    """Perplexities with exact search and with the index, and their difference."""
    from fairseq.evaluation.run import run_evaluation

    found = {name: float(run_evaluation(_configs(words))[2].perplexity) for name, words in _commands(config).items()}
    return found | {"gap": found["index"] - found["exact"]}


def _makes_clusters(given: Mapping[str, Any]) -> bool:
    """True for clusters, False for an index. Raises: ValueError for a flag of the other."""
    wanted = bool(given.get("cluster_dstore"))
    own, other = (ClusterConfig, BuildConfig) if wanted else (BuildConfig, ClusterConfig)
    strange = given.keys() - {field.name for field in fields(own)}
    for field in fields(other):
        if field.name in strange:
            way_out = "leave one of them out" if wanted else "give it too"
            raise ValueError(
                f"{flag_names(field)[0]} {'does not go with' if wanted else 'belongs to'} --cluster_dstore: {way_out}"
            )
    return wanted


def cluster(config: ClusterConfig, argv: Sequence[str]) -> None:
    """Make the clusters a config describes, print one line and write a run manifest beside them."""
    from fairseq.memory.retomaton.build_clusters import build_clusters, open_clustered_store
    from fairseq.runtime.manifest import write_manifest

    made = build_clusters(config)
    sys.stdout.write(
        f"clustered {made.rows} keys in {made.seconds:.1f}s ({made.num_clusters} clusters of a sample of "
        f"{made.sampled}): {made.path}\n"
    )
    write_manifest(
        f"{made.path}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures={
            "rows": made.rows,
            "num_clusters": made.num_clusters,
            "sampled": made.sampled,
            "seconds": made.seconds,
        },
        inputs=open_clustered_store(config).keys.files,
        seed=config.seed,
    )


def cli_main() -> None:
    """Entry point of build_dstore.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

"""Build a faiss index over a datastore that eval_lm.py --save-knnlm-dstore wrote."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.index.build_config import BuildConfig
from fairseq_cli import cluster_dstore
from fairseq_cli.main import run

PROGRAM = "build_dstore.py"


def main(argv: Sequence[str]) -> None:
    """Build the index the words describe, print one line and leave a run manifest beside the index."""
    if cluster_dstore.is_wanted(argv):
        cluster_dstore.cluster(argv, PROGRAM)
        return
    parser = FlagParser(PROGRAM, f"Build an index over the keys of a datastore. {cluster_dstore.HINT}")
    parser.add_config(BuildConfig)
    config = build(BuildConfig, parser.parse(argv, cluster_dstore.OWN_FLAGS))

    from fairseq.manifest import write_manifest
    from fairseq.memory.index.build import build_index, open_store

    built = build_index(config)
    seconds = built.train_seconds + built.add_seconds
    sys.stdout.write(
        f"indexed {built.rows} keys in {seconds:.1f}s "
        f"({config.factory}, {config.dist}, {built.bytes} bytes): {built.path}\n"
    )
    store = open_store(config)
    write_manifest(
        f"{built.path}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures={
            "rows": built.rows,
            "dim": store.dim,
            "index_bytes": built.bytes,
            "train_seconds": built.train_seconds,
            "add_seconds": built.add_seconds,
        },
        inputs=store.keys.files,
        seed=config.seed,
    )


def cli_main() -> None:
    """Entry point of build_dstore.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

"""Line up segments so that neighbours are alike, for train.py --predefined-batches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq.config import FlagParser, build, to_dict
from fairseq.data.bm25.config import MakeBatchesConfig
from fairseq_cli.entry import run

PROGRAM = "bm25_make_batches.py"


def main(argv: Sequence[str]) -> None:
    """Write the batch file, print one line and write a run manifest beside it."""
    parser = FlagParser(PROGRAM, "Line up segments so that neighbours are alike.")
    parser.add_config(MakeBatchesConfig)
    config = build(MakeBatchesConfig, parser.parse(argv))

    import numpy as np

    from fairseq.data.bm25.chain import chain, neighbor_rate
    from fairseq.data.bm25.results import read_results, shard_files
    from fairseq.runtime.atomic_files import write_atomically
    from fairseq.runtime.files import may_create_in
    from fairseq.runtime.manifest import write_manifest

    may_create_in(Path(config.batch_file).absolute().parent)
    neighbors = read_results(Path(config.results_path))
    order = chain(neighbors, config.seed)
    rate = neighbor_rate(order, neighbors)
    shuffled = neighbor_rate(np.random.default_rng(config.seed).permutation(len(order)), neighbors)
    write_atomically(config.batch_file, json.dumps(order.tolist()) + "\n")
    sys.stdout.write(
        f"{len(order)} segments; {100 * rate:.1f}% of those next to each other are retrieved neighbours (a shuffle: "
        f"{100 * shuffled:.1f}%): {config.batch_file}\n"
    )
    write_manifest(
        f"{os.fspath(config.batch_file)}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures={"num_segments": len(order), "neighbor_rate": rate, "neighbor_rate_of_a_shuffle": shuffled},
        inputs=shard_files(Path(config.results_path)),
        seed=config.seed,
    )


def cli_main() -> None:
    """Entry point of bm25_make_batches.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

"""Find the neighbours of every token of a split in the train split, for GNN-LM: fairseq-neighbors STORE ..."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.runtime.atomic_files import require_writable
from fairseq_cli.entry import run

PROGRAM = "fairseq-neighbors"


def main(argv: Sequence[str]) -> None:
    """Search, and say what was found."""
    parser = FlagParser(PROGRAM, NeighborsConfig.__doc__ or "")
    parser.add_config(NeighborsConfig)
    config = build(NeighborsConfig, parser.parse(argv))
    require_writable(os.path.dirname(os.path.abspath(config.path)), "--out")

    from tqdm import tqdm

    from fairseq.memory.gnn.neighbors import count_missing, search_split
    from fairseq.runtime.manifest import require_own_manifest, write_manifest

    manifest = f"{config.shard_path}.run.json"
    require_own_manifest(manifest, PROGRAM, "--out")
    started = time.perf_counter()
    with tqdm(unit=" tokens", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        file = search_split(config, report)
    missing = count_missing(file)
    seconds = time.perf_counter() - started
    sys.stdout.write(
        f"{file.path}: {len(file)} tokens with {config.num_neighbors} neighbours each ({seconds:.1f}s); "
        f"{missing} tokens have fewer\n"
    )
    figures = {"num_tokens": len(file), "k": config.num_neighbors, "num_with_fewer": missing, "seconds": seconds}
    inputs = [str(config.dstore_filename) + ".json", config.queries + ".json"]
    write_manifest(
        manifest,
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures=figures,
        inputs=[name for name in inputs if os.path.isfile(name)],
    )


def cli_main() -> None:
    """Entry point of fairseq-neighbors."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

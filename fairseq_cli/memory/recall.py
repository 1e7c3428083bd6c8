"""Compare taps or layers by the recall of their neighbours, for GNN-LM: fairseq-neighbor-recall FOLDER ..."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.gnn.recall.config import PROGRAM, RecallConfig
from fairseq.runtime.atomic_files import require_writable
from fairseq_cli.entry import run


def main(argv: Sequence[str]) -> None:
    """Measure, print a table for each split and measure, and leave the figures in files."""
    parser = FlagParser(PROGRAM, RecallConfig.__doc__ or "")
    parser.add_config(RecallConfig)
    config = build(RecallConfig, parser.parse(argv))
    require_writable(os.path.dirname(os.path.abspath(config.out_path)), "--out")

    from tqdm import tqdm

    from fairseq.memory.gnn.recall.measure import measure_recall
    from fairseq.memory.gnn.recall.outputs import require_replaceable, searches, tables, write_outputs
    from fairseq.memory.planning.table import aligned
    from fairseq.runtime.manifest import write_manifest

    require_replaceable(config.out_path)
    with tqdm(unit=" tokens", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        curves = measure_recall(config, report)
    written = write_outputs(config.out_path, curves)
    write_manifest(
        f"{config.out_path}.run.json",
        program=PROGRAM,
        argv=argv,
        config=to_dict(config),
        figures={"curves": [curve.to_dict() for curve in curves]},
        inputs=(),
    )
    for title, rows in tables(curves):
        sys.stdout.write("\n".join([title, *aligned(rows), "", ""]))
    sys.stdout.write("\n".join([*searches(curves), ", ".join(written), ""]))


def cli_main() -> None:
    """Entry point of fairseq-neighbor-recall."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

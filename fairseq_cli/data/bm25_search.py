"""Find the segments most like each segment, by BM25."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq.config import FlagParser, build, to_dict
from fairseq.data.bm25.config import SearchConfig
from fairseq_cli.entry import run

PROGRAM = "bm25_search.py"


def main(argv: Sequence[str]) -> None:
    """Search one shard, print one line and write a run manifest beside the results."""
    parser = FlagParser(PROGRAM, "Find the segments most like each segment, by BM25.")
    parser.add_config(SearchConfig)
    config = build(SearchConfig, parser.parse(argv))

    from fairseq.data.bm25.search import search_shard
    from fairseq.runtime.manifest import write_manifest

    done = search_shard(config)
    speed = done.num_searched / done.search_seconds if done.num_searched else 0.0
    sys.stdout.write(
        f"searched {done.num_searched} of {done.num_segments} segments in {done.search_seconds:.1f}s "
        f"({speed:.1f} segments/s), index ready in {done.index_seconds:.1f}s: {done.path}\n"
    )
    manifest = done.path.with_name(f"search{config.shard_id}.run.json")
    if not done.num_searched and manifest.exists():
        return
    figures = {
        "num_segments": done.num_segments,
        "num_searched": done.num_searched,
        "index_seconds": done.index_seconds,
        "search_seconds": done.search_seconds,
    }
    settings = to_dict(config)
    write_manifest(
        manifest, program=PROGRAM, argv=argv, config=settings, figures=figures, inputs=[config.segments_path]
    )


def cli_main() -> None:
    """Entry point of bm25_search.py."""
    run(PROGRAM, main)


if __name__ == "__main__":
    cli_main()

"""Make clusters of a datastore's rows for RetoMaton: ``build_dstore.py --cluster_dstore``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fairseq.config import FlagParser, build, to_dict
from fairseq.memory.cluster_config import ClusterConfig

HINT = "With --cluster_dstore: clusters of them, for RetoMaton; add --help to that for its flags."
OWN_FLAGS = {name: "belongs to --cluster_dstore: give it too" for name in ("--num_clusters", "--sample_size")}


def is_wanted(argv: Sequence[str]) -> bool:
    """Whether the words ask for clusters instead of an index."""
    first = FlagParser("", "")
    first.add_config(ClusterConfig)
    return bool(first.peek(argv).get("cluster_dstore"))


def cluster(argv: Sequence[str], program: str) -> None:
    """Make the clusters the words describe, print one line and leave a run manifest beside them."""
    parser = FlagParser(program, "Make clusters of the keys of a datastore (--cluster_dstore), for RetoMaton.")
    parser.add_config(ClusterConfig)
    config = build(ClusterConfig, parser.parse(argv))

    from fairseq.manifest import write_manifest
    from fairseq.memory.cluster_building import build_clusters, open_clustered_store

    made = build_clusters(config)
    sys.stdout.write(
        f"clustered {made.rows} keys in {made.seconds:.1f}s ({made.num_clusters} clusters of a sample of "
        f"{made.sampled}): {made.path}\n"
    )
    write_manifest(
        f"{made.path}.run.json",
        program=program,
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

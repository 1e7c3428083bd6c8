"""Make clusters of a datastore's rows for RetoMaton: ``build_dstore.py --cluster_dstore``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fairseq.config import flag_names, to_dict
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.retomaton.cluster_config import ClusterConfig


def is_wanted(given: Mapping[str, Any]) -> bool:
    """Whether clusters are asked for instead of an index. Raises: ValueError for a flag of the other."""
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


def cluster(config: ClusterConfig, argv: Sequence[str], program: str) -> None:
    """Make the clusters a config describes, print one line and leave a run manifest beside them."""
    from fairseq.memory.retomaton.build_clusters import build_clusters, open_clustered_store
    from fairseq.runtime.manifest import write_manifest

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

"""Options of clusters of a datastore's rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fairseq.config import flag, require_at_least


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Clusters of the keys of a datastore, which RetoMaton follows pointers by (arXiv 2201.12431)."""

    cluster_dstore: bool = flag("--cluster_dstore", default=False)
    """Make clusters instead of an index."""
    dstore_mmap: str = flag("--dstore_mmap")
    """Prefix of the datastore."""
    clusters: str | None = flag("--clusters", "--members", default=None)
    """File of the clusters; by default PREFIX.clusters.npz, in a folder of a datastore FOLDER/clusters.npz."""
    num_clusters: int | None = flag("--num_clusters", default=None)
    """Clusters the rows are sorted into; by default a 100th of the rows."""
    sample_size: int = flag("--sample_size", default=20_000_000)
    """Randomly chosen keys the clusters are learned from, at most; 256 per cluster are enough."""
    cluster_iterations: int = flag("--cluster_iterations", default=10)
    """Rounds of k-means, at most."""
    seed: int = flag("--seed", default=1)
    """Chooses the sample and where the clusters begin."""
    dstore_size: int | None = flag("--dstore_size", default=None)
    """Rows of the datastore; needed for files of the original programs only, checked otherwise."""
    dimension: int | None = flag("--dimension", default=None)
    """Width of the keys; needed for files of the original programs only, checked otherwise."""
    dstore_fp16: bool = flag("--dstore_fp16", default=False)
    """The datastore's keys are float16."""
    dstore_bf16: bool = flag("--dstore_bf16", default=False)
    """The datastore's keys are bfloat16."""

    def __post_init__(self) -> None:
        require_at_least(1, between="_", sample_size=self.sample_size, cluster_iterations=self.cluster_iterations)
        require_at_least(1, between="_", num_clusters=self.num_clusters, dstore_size=self.dstore_size)
        require_at_least(1, between="_", dimension=self.dimension)

    @property
    def path(self) -> Path:
        """File for the clusters."""
        from fairseq.memory.datastore.layout import StoreName  # NumPy, without which --help has to do

        named = self.clusters
        return Path(named) if named else StoreName.of(self.dstore_mmap).existing_side_file("clusters.npz")

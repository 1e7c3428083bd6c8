"""Options of fairseq-neighbors. No torch here: the flags are made from these."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_at_least, require_shard, require_within, shard_suffix
from fairseq.memory.sources.config import check_search_on


@dataclass(frozen=True, kw_only=True)
class NeighborsConfig:
    """Neighbours of every token of a split, for the graph of GNN-LM (arXiv 2110.08743, sec. 2.1)."""

    queries: str = flag("queries")
    """Prefix of the datastore of the split: its keys are searched for, row by row."""
    dstore_filename: str | None = flag("--dstore-filename", default=None)
    """Prefix of the datastore of the train split, which is searched."""
    indexfile: str | None = flag("--indexfile", default=None)
    """The faiss index over it; without one the search is exact."""
    out: str | None = flag("--out", default=None)
    """File to write; by default the prefix of the split's datastore and .neighbors."""
    num_neighbors: int = flag("--k", default=32)
    """Neighbours kept for each token."""
    faiss_metric_type: str = flag("--faiss-metric-type", default="cos", choices=("l2", "ip", "cos"))
    """Metric: minus the squared distance, inner product or cosine."""
    probe: int = flag("--probe", default=32)
    """Lists of the index that are searched for a token."""
    band: int = flag("--invalid-neighbor-context", default=1536)
    """Of the train split itself: take no neighbour nearer than this in the text to the token it is for."""
    exclude_own_document: bool = flag("--exclude-own-document", default=False)
    """Of the train split itself: take no neighbour of the token's own document."""
    no_replacement: bool = flag("--no-replacement", default=False)
    """Keep no other neighbours in place of those that are too near, as the original does: their places stay empty. How
    many are empty depends on keys that have read later tokens, which is a small leak."""
    bulk: int = flag("--knn-bulk", default=8192)
    """Tokens that are searched for at once."""
    num_shards: int = flag("--num-shards", default=1)
    """Parts the split is cut into, for as many commands; a reader finds all of them by the name of the file."""
    shard_id: int = flag("--shard-id", default=0)
    """Part that this command takes, from 0."""
    search_memory: float = flag("--search-memory", default=2.0)
    """GB that an exact search may take."""
    search_on: str | None = flag("--search-on", default=None)
    """Search by Ray actors: ray, or ray://HOST:PORT."""
    search_workers: int | None = flag("--search-workers", default=None)
    """Actors of --search-on."""

    def __post_init__(self) -> None:
        if not self.dstore_filename:
            raise ValueError("give --dstore-filename: the datastore of the train split, which is searched")
        require_within(1, LARGEST_COUNT, k=self.num_neighbors, probe=self.probe, knn_bulk=self.bulk)
        require_within(1e-6, 1e6, hint="it is in GB, 2 is the default", search_memory=self.search_memory)
        require_at_least(0, invalid_neighbor_context=self.band)
        require_shard(self.shard_id, self.num_shards)
        check_search_on(self.search_on, self.search_workers)

    @property
    def path(self) -> str:
        """The file, without the ending of a shard."""
        return self.out or f"{self.queries.rstrip('/')}.neighbors"

    @property
    def shard_path(self) -> str:
        """The file of this command's shard."""
        return self.path + shard_suffix(self.shard_id, self.num_shards)

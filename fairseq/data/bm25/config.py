"""Options of BM25 search over segments, and of ordering them by similarity."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least

BACKENDS = ("bm25s", "pyserini")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of the search for the segments with the highest BM25 scores."""

    index_path: str = flag("--index_path")
    """Folder of the index, built by pyserini.index.lucene or by this program, which builds it if it is missing."""
    segments_path: str = flag("--segments_path")
    """JSON file of the segments (train.py --output-segments-to-file or --output-samples-to-file); each is a query."""
    results_path: str = flag("--results_path")
    """Folder for the results, one shard<i>.json per shard."""
    num_shards: int = flag("--num_shards", default=1)
    """Number of shards of the search, for as many processes or machines."""
    shard_id: int = flag("--shard_id", default=0)
    """Shard that this process searches, from 0."""
    num_neighbors: int = flag("--num_neighbors", "--topk", default=20)
    """Number of neighbours per segment, itself excluded."""
    backend: str | None = flag("--backend", default=None, choices=BACKENDS)
    """Search backend: bm25s (needs no Java), or pyserini (Lucene's own scores); by default pyserini for a Lucene index
    and bm25s for anything else."""

    def __post_init__(self) -> None:
        require_at_least(1, between="_", num_shards=self.num_shards, num_neighbors=self.num_neighbors)
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(
                f"--shard_id {self.shard_id} is not below --num_shards {self.num_shards}; "
                f"give 0 to {self.num_shards - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class MakeBatchesConfig:
    """Options of the order of all segments in which adjacent ones are similar."""

    results_path: str = flag("--results_path")
    """Folder that bm25_search.py filled."""
    batch_file: str = flag("--batch_file")
    """JSON list to write, for train.py --predefined-batches."""
    seed: int = flag("--seed", default=1)
    """Seed of the next segment when no neighbour is left."""

"""Options of ``fairseq-datastore plan``."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.config import flag, require_at_least, require_within
from fairseq.memory.datastore.config import KEY_TYPES, count


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate disk, memory and time of a datastore and of each kind of index on this machine, before building any."""

    keys: int = flag("--keys", parse=count)
    """Rows of the datastore; also accepts 103e6."""
    dim: int = flag("--dim")
    """Width of the keys."""
    dtype: str = flag("--dtype", default="float32", choices=KEY_TYPES)
    """Type of the keys."""
    queries: int = flag("--queries", default=250_000, parse=count)
    """Scored tokens of the evaluation."""
    k: int = flag("--k", default=1024)
    """Neighbours per query."""
    ncentroids: int = flag("--ncentroids", default=4096)
    """Number of inverted lists."""
    code_size: int = flag("--code-size", default=64)
    """Bytes of a compressed key."""
    probe: int = flag("--probe", default=8)
    """Lists probed per query."""
    train_size: int = flag("--train-size", default=1_000_000, parse=count)
    """Largest number of training keys."""
    search_memory: float = flag("--search-memory", default=2.0)
    """Limit on the working memory of exact search, in GB."""
    folder: str = flag("--folder", default=".")
    """Folder for the files; its disk is measured."""
    json: bool = flag("--json", default=False)
    """Print a JSON object."""

    def __post_init__(self) -> None:
        require_at_least(1, keys=self.keys, dim=self.dim, queries=self.queries, k=self.k, ncentroids=self.ncentroids)
        require_at_least(1, code_size=self.code_size, probe=self.probe, train_size=self.train_size)
        require_within(1e-6, 1e6, hint="it is in GB; give 2, for example", search_memory=self.search_memory)
        if self.k > self.keys:
            raise ValueError(f"--k {self.k} is larger than --keys {self.keys}; give at most {self.keys}")
        if self.ncentroids > self.keys:
            suggested = max(1, self.keys // 100)
            raise ValueError(f"--ncentroids {self.ncentroids} is more than --keys {self.keys}; give about {suggested}")
        if self.dim % (2 * self.code_size):
            candidates = [size for size in range(1, self.dim + 1) if self.dim % (2 * size) == 0]
            nearest = min(candidates, key=lambda size: abs(size - self.code_size), default=0)
            hint = f"give {nearest}, for example" if nearest else "give an even --dim"
            raise ValueError(f"--code-size {self.code_size} does not divide half the width {self.dim}; {hint}")

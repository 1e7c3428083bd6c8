"""Options of ``fairseq-datastore plan``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fairseq.config import flag, require_at_least
from fairseq.memory.datastore.config import KEY_TYPES, count


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Tell what a datastore and each kind of index would take in bytes and seconds here, before any is built."""

    keys: int = flag("--keys", parse=count)
    """Rows of the datastore; 103e6 is read too."""
    dim: int = flag("--dim")
    """Width of the keys."""
    dtype: str = flag("--dtype", default="float32", choices=KEY_TYPES)
    """Type of the keys."""
    queries: int = flag("--queries", default=250_000, parse=count)
    """Scored tokens of an evaluation."""
    k: int = flag("--k", default=1024)
    """Neighbours per query."""
    ncentroids: int = flag("--ncentroids", default=4096)
    """Lists the keys are sorted into."""
    code_size: int = flag("--code-size", default=64)
    """Bytes of a compressed key."""
    probe: int = flag("--probe", default=8)
    """Lists a search visits."""
    train_size: int = flag("--train-size", default=1_000_000, parse=count)
    """Keys an index learns from, at most."""
    search_memory: float = flag("--search-memory", default=2.0)
    """GB that exact search may take."""
    folder: str = flag("--folder", default=".")
    """Folder for the files; its disk is measured."""
    json: bool = flag("--json", default=False)
    """Print a JSON object."""

    def __post_init__(self) -> None:
        require_at_least(1, keys=self.keys, dim=self.dim, queries=self.queries, k=self.k, ncentroids=self.ncentroids)
        require_at_least(1, code_size=self.code_size, probe=self.probe, train_size=self.train_size)
        if not 0.0 < self.search_memory < math.inf:
            raise ValueError(f"--search-memory {self.search_memory} is not a positive number of GB; 2 is the default")
        if self.k > self.keys:
            raise ValueError(f"--k {self.k} is larger than --keys {self.keys}; give at most as many")
        if self.ncentroids > self.keys:
            about = max(1, self.keys // 100)
            raise ValueError(f"--ncentroids {self.ncentroids} is more than --keys {self.keys}; give about {about}")
        if self.dim % (2 * self.code_size):
            fitting = [size for size in range(1, self.dim + 1) if self.dim % (2 * size) == 0]
            hint = f"give {min(fitting, key=lambda size: abs(size - self.code_size))}, say" if fitting else "it is odd"
            raise ValueError(f"--code-size {self.code_size} does not divide half the width {self.dim}; {hint}")

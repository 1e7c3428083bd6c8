"""Options of fairseq-neighbor-recall. No torch here: the flags are made from these."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fairseq.config import LARGEST_COUNT, flag, require_at_least, require_within

PROGRAM = "fairseq-neighbor-recall"
SEARCHED = 1024
"""Neighbours that are searched for where no number is given."""


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Compare stores of one text by how often their neighbours hold the token: stores of other taps or layers."""

    folders: tuple[str, ...] = flag("folders", default=())
    """Folders of stores, one for each tap or layer; each holds the store of train and of the splits by their names."""
    splits: tuple[str, ...] = flag("--splits", default=("valid",))
    """Splits whose tokens have neighbours."""
    train: str = flag("--train-split", default="train")
    """Split that the neighbours are of."""
    num_neighbors: int | None = flag("--k", default=None)
    """Largest number of neighbours; by default as many as are kept, or 1024 where they are searched."""
    out: str | None = flag("--out", default=None)
    """Start of the names of the JSON file and the plot; by default recall in the first folder."""
    faiss_metric_type: str | None = flag("--faiss-metric-type", default=None, choices=("l2", "ip", "cos"))
    """Metric; by default that of the kept neighbours, or cos where they are searched."""
    band: int | None = flag("--invalid-neighbor-context", default=None)
    """Of the train split itself: no neighbour is nearer than this; by default as kept, or 1536 in a search."""
    search_memory: float = flag("--search-memory", default=2.0)
    """GB that a search may take."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("name one folder of stores at least; several are compared")
        names = [os.path.abspath(folder) for folder in self.folders]
        twice = [folder for folder, name in zip(self.folders, names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is named twice; name each folder once")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"--splits {' '.join(self.splits)} names none, or one twice; name each split once")
        require_within(1, LARGEST_COUNT, k=self.num_neighbors)
        require_at_least(0, invalid_neighbor_context=self.band)
        require_within(1e-6, 1e6, hint="it is in GB, 2 is the default", search_memory=self.search_memory)

    @property
    def out_path(self) -> str:
        """Start of the names of the files."""
        return self.out or os.path.join(self.folders[0], "recall")

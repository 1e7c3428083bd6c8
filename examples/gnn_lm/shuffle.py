"""Stores whose neighbours say nothing: python examples/gnn_lm/shuffle.py STORES OUT [--seed N]

OUT gets links to the datastores of STORES, and for each split neighbours that are another token's: the same ones as
often, in another order of tokens. Layers over them have the parameters and the text of layers over the true ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq.config import FlagParser, build, flag
from fairseq.memory.datastore import Datastore
from fairseq.memory.gnn.neighbors import SplitNeighbors
from fairseq.memory.gnn.row_file import RowWriter, beside

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Options of the shuffled neighbours."""

    folders: tuple[str, ...] = flag("folders")
    """Folder of the stores, and folder to write."""
    seed: int = flag("--seed", default=1)
    """Which token gets whose neighbours."""

    def __post_init__(self) -> None:
        if len(self.folders) != 2:
            raise ValueError(f"{len(self.folders)} folders are named; give the one of the stores and the one to write")


def link(stores: Path, out: Path) -> None:
    """Link the files of the datastores."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(stores.iterdir()):
        if ".neighbors" not in path.name and not (out / path.name).exists():
            (out / path.name).symlink_to(path.resolve())


def shuffle(neighbors: SplitNeighbors, path: Path, seed: int) -> None:
    """Write the neighbours of a split with its tokens in another order; a complete file is kept."""
    if beside(path, "json").exists():
        return
    order_N = torch.randperm(len(neighbors), generator=torch.Generator().manual_seed(seed))
    made_of = dict(neighbors.made_of) | {"shuffled": seed}
    with RowWriter(path, len(neighbors), neighbors.k, str(neighbors.rows.dtype), made_of) as writer:
        if writer.rows_done < len(neighbors):
            writer.append(neighbors.rows.take(order_N[writer.rows_done :]))
        writer.finish()


def main(argv: Sequence[str]) -> None:
    """Link the stores and write the neighbours."""
    parser = FlagParser("shuffle.py", "Stores whose neighbours say nothing.")
    parser.add_config(ShuffleConfig)
    config = build(ShuffleConfig, parser.parse(argv))
    stores, out = (Path(folder) for folder in config.folders)
    train = Datastore.open(str(stores / "train"))
    neighbors = {split: SplitNeighbors.open(stores / f"{split}.neighbors", train=train) for split in SPLITS}
    link(stores, out)
    for split in SPLITS:
        shuffle(neighbors[split], out / f"{split}.neighbors", config.seed)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"shuffle.py: error: {error}\n")
        sys.exit(2)

"""Put runs of run.sh with different seeds side by side: python examples/trime/compare.py FOLDER...

Prints, per variant, the mean perplexity over the folders with its spread, and whether each variant is below the one
above it in every folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

VARIANTS = ("plain", "local", "long", "external")


def perplexities(folders: list[Path], variant: str, split: str) -> list[float]:
    """One per folder."""
    files = [folder / f"{variant}.{split}.json" for folder in folders]
    return [float(json.loads(file.read_text(encoding="utf-8"))["perplexity"]) for file in files]


def main(folders: list[Path]) -> None:
    """Print the table."""
    if not folders:
        sys.exit("compare.py: error: name the folders that run.sh made, one per seed")
    missing = [str(f / f"{v}.valid.json") for f in folders for v in VARIANTS if not (f / f"{v}.valid.json").exists()]
    if missing:
        sys.exit(
            f"compare.py: error: {missing[0]} is missing; run examples/trime/run.sh {Path(missing[0]).parent} first"
        )
    sys.stdout.write(f"| variant | valid, mean of {len(folders)} (lowest to highest) | test | below the one above |\n")
    sys.stdout.write("|---|---|---|---|\n")
    above: dict[str, list[float]] = {}
    for variant in VARIANTS:
        now = {split: perplexities(folders, variant, split) for split in ("valid", "test")}
        cells = [f"{statistics.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in now.values()]
        order = "-"
        if above:
            pairs = [a > b for split in now for a, b in zip(above[split], now[split])]
            order = f"{sum(pairs)} of {len(pairs)}"
        sys.stdout.write(f"| {variant} | {' | '.join(cells)} | {order} |\n")
        above = now


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])

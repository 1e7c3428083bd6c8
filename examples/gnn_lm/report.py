"""The table and the plot of run.sh: python examples/gnn_lm/report.py FOLDER...

With several folders, one per seed, it prints means with their spread, and how often each line is below another one.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq.config import FlagParser, build, flag
from fairseq.runtime.atomic_files import write_atomically

SYSTEMS = {
    "lm": "language model",
    "knn": "kNN-LM",
    "gnn": "GNN-LM",
    "gnn-states": "the same from stored states",
    "gnn-knn": "GNN-LM + kNN, the language model's keys",
    "gnn-own-knn": "GNN-LM + kNN, its own keys",
    "gnn-shuffled": "trained and evaluated with other tokens' neighbours",
    "gnn-shuffled-later": "GNN-LM evaluated with other tokens' neighbours",
    "gnn-keys": "two layers over states, windows of one position to each side",
    "gnn-intra": "layers that read their own text too",
    "first-lm": "language model of the other half",
    "first-gnn": "GNN-LM over it, held-out features",
    "second-lm": "language model of the same half",
    "second-gnn": "GNN-LM over it, fitted features",
}
BELOW = {
    "knn": "lm", "gnn": "lm", "gnn-knn": "knn", "gnn-own-knn": "knn", "gnn-shuffled": "lm", "gnn-keys": "lm",
    "gnn-intra": "lm", "first-gnn": "first-lm", "second-gnn": "second-lm",
}  # fmt: skip
"""Each line, and the line it is compared with."""
SPLITS = ("valid", "test")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of the report."""

    folders: tuple[str, ...] = flag("folders")
    """Folders that run.sh made, one per seed."""


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def perplexities(out: Path, name: str) -> dict[str, float]:
    """Of one line by split, as far as it was evaluated; settings of neighbours are those that were best on valid."""
    swept = out / f"{name}.json"
    if swept.exists():
        record = read(swept)
        return {"valid": record["best"]["perplexity"], "test": record["reported"]["perplexity"]}
    paths = {split: out / f"{name}.{split}.json" for split in (*SPLITS, "train")}
    return {split: read(path)["perplexity"] for split, path in paths.items() if path.exists()}


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Perplexity of every line, and its test figure against the line it is compared with."""
    lines = ["| | valid | test | against |", "|---|---|---|---|"]
    for name, by_split in found.items():
        cells = [f"{by_split[split]:.2f}" if split in by_split else "" for split in SPLITS]
        other = found.get(BELOW.get(name, ""), {})
        against = ""
        if "test" in other and "test" in by_split:
            against = f"{100 * (by_split['test'] / other['test'] - 1):+.1f} %, {SYSTEMS[BELOW[name]]}"
        lines.append(f"| {SYSTEMS[name]} | {' | '.join(cells)} | {against} |")
    return lines


def by_count(out: Path) -> list[tuple[int, float]]:
    """Perplexity on valid by the neighbours that a token reads (--gcn-k); 0 is the language model."""
    found = {0: perplexities(out, "lm").get("valid", math.nan)}
    for path in out.glob("gnn-k[0-9]*.valid.json"):
        found[int(path.name.split(".")[0].removeprefix("gnn-k"))] = read(path)["perplexity"]
    return sorted(found.items())


def draw(out: Path, path: Path) -> None:
    """Perplexity against the number of neighbours, and by the place in the block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, values = zip(*by_count(out))
    left.plot(range(len(counts)), values, "o-")
    left.set_xticks(range(len(counts)), counts)
    left.set_xlabel("neighbours of a token (--gcn-k); 0: language model alone")
    left.set_ylabel("perplexity on valid")
    for name in ("lm", "gnn"):
        places = read(out / f"{name}.valid.json")["positions"]
        right.plot(
            [row["last"] + 1 for row in places], [row["perplexity"] for row in places], "o-", label=SYSTEMS[name]
        )
    right.set_xscale("log", base=2)
    right.set_xlabel("place in the block, up to")
    right.legend()
    figure.savefig(path, dpi=150)


def settings(out: Path) -> dict[str, dict[str, Any]]:
    """What was chosen on valid, by line."""
    names = [name for name in SYSTEMS if (out / f"{name}.json").exists()]
    return {
        name: {key: read(out / f"{name}.json")["best"][key] for key in ("k", "lmbda", "softmax_temp")} for name in names
    }


def report_of_one(out: Path) -> str:
    """Tables of one folder; leaves results.md, results.json and perplexity.png in it."""
    found = {name: figures for name in SYSTEMS if (figures := perplexities(out, name))}
    if "lm" not in found and "first-lm" not in found:
        raise ValueError(f"{out} holds no figures, such as lm.test.json; run examples/gnn_lm/run.sh {out}")
    chosen, counts = settings(out), by_count(out)
    seconds = {path.stem: int(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.seconds"))}
    lines = table(found)
    for name, values in chosen.items():
        lines.append(
            f"\n{SYSTEMS[name]}, chosen on valid: " + ", ".join(f"{key} {value:g}" for key, value in values.items())
        )
    lines += [
        "\n| neighbours | " + " | ".join(str(count) for count, _ in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    lines.append("| valid | " + " | ".join(f"{value:.2f}" for _, value in counts) + " |")
    lines.append(f"\n{sum(seconds.values())} seconds")
    record = {"perplexity": found, "chosen": chosen, "by_count": counts, "seconds": seconds}
    write_atomically(out / "results.json", json.dumps(record, indent=1) + "\n")
    text = "\n".join(lines) + "\n"
    write_atomically(out / "results.md", text)
    if "gnn" in found:
        draw(out, out / "perplexity.png")
    return text


def spread(values: Sequence[float]) -> str:
    """Mean, and lowest to highest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report_of_seeds(folders: Sequence[Path]) -> str:
    """A table of means over runs with different seeds."""
    missing = next((folder for folder in folders if not (folder / "results.json").exists()), None)
    if missing is not None:
        raise ValueError(f"{missing} holds no results.json; run examples/gnn_lm/run.sh {missing}")
    records = [read(folder / "results.json")["perplexity"] for folder in folders]
    lines = [
        f"| | valid, mean of {len(records)} (lowest to highest) | test | not above, on test |",
        "|---|---|---|---|",
    ]
    for name in SYSTEMS:
        rows = [record[name] for record in records if set(SPLITS) <= set(record.get(name, ()))]
        if len(rows) < len(records):
            continue
        cells = [spread([row[split] for row in rows]) for split in SPLITS]
        told = ""
        if (other := BELOW.get(name)) and all(other in record for record in records):
            below = sum(record[name]["test"] <= record[other]["test"] for record in records)
            told = f"{SYSTEMS[other]}: {below} of {len(records)}"
        lines.append(f"| {SYSTEMS[name]} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Print the tables of one folder or of several."""
    parser = FlagParser("report.py", "The tables and the plot of run.sh.")
    parser.add_config(ReportConfig)
    config = build(ReportConfig, parser.parse(argv))
    folders = [Path(folder) for folder in config.folders]
    sys.stdout.write(report_of_seeds(folders) if len(folders) > 1 else report_of_one(folders[0]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"report.py: error: {error}\n")
        sys.exit(2)

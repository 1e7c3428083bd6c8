"""The demo's table: read the figures that eval_lm.py left, print them, and write them as JSON and as a bar chart."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq.config import FlagParser, build, flag
from fairseq.runtime.atomic_files import write_atomically
from fairseq_cli.entry import run

SPLITS = ("valid", "test")
METHODS = {
    "plain": "language model alone",
    "knn": "kNN-LM",
    "local": "TRIME, local memory",
    "long": "TRIME, local and long-term",
    "external": "TRIME, external as well",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where the figures are."""

    folder: str = flag("folder")
    """The demo's folder, with METHOD.SPLIT.json and knn-LAMBDA.SPLIT.json; results.json and results.png go there."""
    best_weight: bool = flag("--best-weight", default=False)
    """Print only the neighbours' share with the lowest perplexity on valid."""


@dataclass(frozen=True)
class Row:
    """One line of the table; a perplexity or speed is missing where a split was not evaluated."""

    method: str
    weight: float
    """Share of the neighbours in kNN-LM, else 0."""
    perplexity: dict[str, float]
    """Per split."""
    seconds: float
    """Of all splits together, without start-up."""
    tokens_per_second: float


def read_rows(folder: Path) -> list[Row]:
    """In the order of METHODS, kNN-LM by growing weight. Raises: ValueError when there is no plain figure."""
    figures: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
    for path in folder.glob("*.json"):
        found = re.fullmatch(r"([a-z]+)(?:-([0-9.]+))?\.(valid|test)\.json", path.name)
        if found and found[1] in METHODS:
            which = figures.setdefault((found[1], float(found[2] or 0)), {})
            which[found[3]] = json.loads(path.read_text(encoding="utf-8"))
    if ("plain", 0.0) not in figures:
        raise ValueError(f"{folder} has no plain.valid.json or plain.test.json; run train_scripts/shakespeare-demo.sh")
    names = list(METHODS)
    return [_row(*key, figures[key]) for key in sorted(figures, key=lambda key: (names.index(key[0]), key[1]))]


def _row(name: str, weight: float, by_split: dict[str, dict[str, float]]) -> Row:
    seconds = sum(one["seconds"] for one in by_split.values())
    tokens = sum(one["num_tokens"] for one in by_split.values())
    return Row(
        method=METHODS[name] + (f", lambda {weight:g}" if weight else ""),
        weight=weight,
        perplexity={split: by_split[split]["perplexity"] for split in SPLITS if split in by_split},
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )


def read_stages(folder: Path) -> dict[str, int]:
    """Wall-clock seconds of each stage that ran here, start-up included."""
    return {path.stem: int(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.seconds"))}


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table, with columns wide enough to be read as it stands."""
    lines = [["method", *(f"{split} perplexity" for split in SPLITS), "seconds", "tokens/s"]]
    for row in rows:
        perplexities = [f"{row.perplexity[s]:.2f}" if s in row.perplexity else "-" for s in SPLITS]
        lines.append([row.method, *perplexities, f"{row.seconds:.1f}", f"{row.tokens_per_second:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def best_weight(rows: Sequence[Row]) -> float:
    """The share of the neighbours with the lowest perplexity on valid. Raises: ValueError when none was tried."""
    tried = [row for row in rows if row.weight and "valid" in row.perplexity]
    if not tried:
        raise ValueError("no kNN evaluation on valid is there to choose from")
    return min(tried, key=lambda row: row.perplexity["valid"]).weight


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar per method and split, the height being the perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.6 * len(rows), 4), layout="constrained")
    width = 0.38
    for number, split in enumerate(SPLITS):
        heights = [row.perplexity.get(split, 0.0) for row in rows]
        places = [i + (number - 0.5) * width for i in range(len(rows))]
        bars = axes.bar(places, heights, width, label=split, color=("#4c72b0", "#dd8452")[number])
        axes.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=8)
    axes.set_xticks(range(len(rows)), [row.method.replace(", ", "\n") for row in rows])
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Shakespeare's plays: small language models, alone and with memory")
    axes.margins(y=0.22)  # room for the legend above the bars and their figures
    axes.legend(loc="upper right", ncols=len(SPLITS))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    """Print the table; write results.json and results.png beside the figures."""
    parser = FlagParser("shakespeare_demo_report.py", "Make the demo's table from its figures.")
    parser.add_config(ReportConfig)
    config = build(ReportConfig, parser.parse(argv))
    folder = Path(config.folder)
    rows, stages = read_rows(folder), read_stages(folder)
    if config.best_weight:
        sys.stdout.write(f"{best_weight(rows):g}\n")
        return
    record = {"rows": [asdict(row) for row in rows], "stage_seconds": stages}
    write_atomically(folder / "results.json", json.dumps(record, indent=1) + "\n")
    draw(rows, folder / "results.png")
    sys.stdout.write(f"\n{as_table(rows)}\n\n")
    if stages:
        parts = ", ".join(f"{name} {seconds}" for name, seconds in stages.items() if "." not in name)
        evaluation = sum(seconds for name, seconds in stages.items() if "." in name)
        sys.stdout.write(f"seconds: {parts}, evaluation {evaluation}, all {sum(stages.values())}\n")
    sys.stdout.write(f"written: {folder / 'results.json'}, {folder / 'results.png'}\n")


if __name__ == "__main__":
    run("shakespeare_demo_report.py", main)

"""The demo's table: read the figures that eval_lm.py left, print them, and write them as JSON and as a bar chart."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
    """The demo's folder, with METHOD.SPLIT.json and knn.sweep.json; results.json and results.png go there."""
    took: int | None = flag("--took", default=None)
    """Wall-clock seconds of this start, to print beside those that prediction.json predicted."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    weight: float
    """Share of the neighbours in kNN-LM, else 0."""
    perplexity: dict[str, float]
    """Per split that was evaluated."""
    seconds: float | None
    """Of all splits together, without start-up; None for a share that a sweep evaluated from another one's search."""
    tokens_per_second: float | None


def read_rows(folder: Path) -> list[Row]:
    """In the order of METHODS, kNN-LM by growing weight. Raises: ValueError when there is no plain figure."""
    rows = {name: _rows(name, folder) for name in METHODS}
    if not rows["plain"]:
        raise ValueError(f"{folder} has no plain.valid.json or plain.test.json; run train_scripts/shakespeare-demo.sh")
    return [row for found in rows.values() for row in found]


def _rows(name: str, folder: Path) -> list[Row]:
    paths = {split: folder / f"{name}.{split}.json" for split in SPLITS}
    figures = {split: _read(path) for split, path in paths.items() if path.exists()}
    if not figures:
        return []
    seconds = sum(one["seconds"] for one in figures.values())
    row = Row(
        method=METHODS[name],
        weight=0.0,
        perplexity={split: one["perplexity"] for split, one in figures.items()},
        seconds=seconds,
        tokens_per_second=sum(one["num_tokens"] for one in figures.values()) / seconds,
    )
    sweep = folder / f"{name}.sweep.json"
    return [row] if not sweep.exists() else _swept(row, _read(sweep))


def _swept(row: Row, sweep: Any) -> list[Row]:
    """A row for each share. The best on valid was tried on test too, and has the time of the searches."""
    rows = []
    for setting in sorted(sweep["settings"], key=lambda setting: float(setting["lmbda"])):
        weight, best = setting["lmbda"], setting["lmbda"] == sweep["best"]["lmbda"]
        swept = replace(row, method=f"{row.method}, lambda {weight:g}", weight=weight)
        perplexity = {sweep["tuned_on"]: setting["perplexity"]}
        if best:
            perplexity |= {sweep["reported_on"]: sweep["reported"]["perplexity"]}
            rows.append(replace(swept, perplexity=perplexity))
        else:
            rows.append(replace(swept, perplexity=perplexity, seconds=None, tokens_per_second=None))
    return rows


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_stages(folder: Path) -> dict[str, int]:
    """Wall-clock seconds of each stage that ran here, start-up included."""
    return {path.stem: int(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.seconds"))}


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table, with columns wide enough to be read as it stands."""
    lines = [["method", *(f"{split} perplexity" for split in SPLITS), "seconds", "tokens/s"]]
    for row in rows:
        perplexities = [f"{row.perplexity[s]:.2f}" if s in row.perplexity else "-" for s in SPLITS]
        times = ["-", "-"] if row.seconds is None else [f"{row.seconds:.1f}", f"{row.tokens_per_second:.0f}"]
        lines.append([row.method, *perplexities, *times])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


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
    prediction = _read(folder / "prediction.json") if config.took is not None else {}
    record = {"rows": [asdict(row) for row in rows], "stage_seconds": stages, "wall_seconds": config.took}
    write_atomically(folder / "results.json", json.dumps(record | {"prediction": prediction}, indent=1) + "\n")
    draw(rows, folder / "results.png")
    sys.stdout.write(f"\n{as_table(rows)}\n\n")
    if stages:
        parts = ", ".join(f"{name} {seconds}" for name, seconds in stages.items() if "." not in name)
        evaluation = sum(seconds for name, seconds in stages.items() if "." in name)
        sys.stdout.write(f"seconds: {parts}, evaluation {evaluation}, all {sum(stages.values())}\n")
    if config.took is not None:
        sys.stdout.write(f"this start took {config.took} s; predicted were {prediction['seconds']:.0f} s\n")
    sys.stdout.write(f"written: {folder / 'results.json'}, {folder / 'results.png'}\n")


if __name__ == "__main__":
    run("shakespeare_demo_report.py", main)

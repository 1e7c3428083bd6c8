"""The table and the curve of domain_adaptation.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq.runtime.atomic_files import write_atomically


@dataclass(frozen=True)
class Row:
    """What one way of evaluating came to."""

    method: str
    perplexity: float
    num_tokens: int
    tokens_per_second: float
    saved_share: float | None
    """Searches that were not needed, of one per token."""
    peak_memory_mb: float | None
    min_knns: int | None = None
    """Of RetoMaton."""

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table, with columns wide enough to be read as it stands."""
    lines = [["method", "perplexity", "tokens/s", "of plain", "searches saved", "peak memory, MB"]]
    for row in rows:
        saved = "-" if row.saved_share is None else f"{100 * row.saved_share:.1f}%"
        peak = "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}"
        speed = f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}x"
        lines.append([row.method, f"{row.perplexity:.2f}", f"{row.tokens_per_second:.0f}", speed, saved, peak])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def write_report(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Write results.json, results.md and saved_searches.png; returns the text of results.md."""
    told = (
        f"{about['model']} ({about['dtype']}), a datastore of {about['datastore_rows']} keys, "
        f"lambda {about['lmbda']:g}, temperature {about['knn_temp']:g}, both chosen on the validation text; "
        f"{rows[0].num_tokens} tokens of the test text, {about['threads']} threads; {about['seconds']:.0f} s in all."
    )
    text = f"{told}\n\n{as_table(rows)}\n"
    record = dict(about) | {"rows": [row.to_dict() for row in rows]}
    write_atomically(folder / "results.json", json.dumps(record, indent=1) + "\n")
    write_atomically(folder / "results.md", text)
    draw(rows, folder / "saved_searches.png")
    return text


def draw(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the share of saved searches, a point per ``--min-knns``; the others as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = sorted((row for row in rows if row.saved_share is not None), key=lambda row: row.saved_share or 0.0)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    shares = [100 * (row.saved_share or 0.0) for row in curve]
    axes.plot(shares, [row.perplexity for row in curve], "o-", color="#4c72b0", label="RetoMaton")
    for share, row in zip(shares, curve):
        axes.annotate(str(row.min_knns), (share, row.perplexity), (4, -12), textcoords="offset points", fontsize=8)
    for row, style in zip((row for row in rows if row.saved_share is None), ("--", ":")):
        axes.axhline(row.perplexity, linestyle=style, color="#555555", label=f"{row.method}: {row.perplexity:.2f}")
    axes.set_xlabel("searches saved, % (at each point: --min-knns)")
    axes.set_ylabel("perplexity of the test text (lower is better)")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

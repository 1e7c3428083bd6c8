"""What a comparison of recall leaves: tables, a JSON file and a plot."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq.memory.gnn.recall.config import PROGRAM
from fairseq.memory.gnn.recall.measure import RecallCurve
from fairseq.runtime.atomic_files import write_atomically, writing
from fairseq.runtime.files import read_json
from fairseq.runtime.manifest import require_own_manifest

logger = logging.getLogger(__name__)

FORMAT = "fairseq-memory recall 1"
_DRAWN_BY = "Matplotlib"  # all that a plot says of itself beside figures without the format's name
_PLOT_HEAD = 1 << 12  # bytes of a plot that hold its description

MEASURES = {
    "share": "neighbours that hold the token, of all found",
    "any": "tokens that one of their neighbours holds, of all",
    "count": "neighbours that hold the token, per token",
}


def tables(curves: Sequence[RecallCurve]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """For each split and measure a title, and rows whose first one is the head: a column for each folder."""
    found = []
    for split in dict.fromkeys(curve.split for curve in curves):
        of_split = [curve for curve in curves if curve.split == split]
        head = ("k", *_names(of_split))
        for name, meaning in MEASURES.items():
            rows = [
                (str(points[0].k), *(f"{getattr(point, name):.4f}" for point in points))
                for points in zip(*(curve.points for curve in of_split))
            ]
            found.append((f"{split}, {of_split[0].num_tokens} tokens: {meaning}", [head, *rows]))
    return found


def searches(curves: Sequence[RecallCurve]) -> list[str]:
    """A line for each folder and split: how its neighbours were searched."""
    words = {"metric": "by {}", "index": "index {}", "band": "none nearer than {} tokens"}
    return [
        f"{curve.folder}, {curve.split}: neighbours "
        + ", ".join(text.format(curve.made_of[name]) for name, text in words.items() if name in curve.made_of)
        for curve in curves
    ]


def _names(curves: Sequence[RecallCurve]) -> list[str]:
    """The folders as short as tells them apart, for different curves of one split."""
    folders = [os.path.normpath(curve.folder) for curve in curves]
    short = [os.path.basename(folder) for folder in folders]
    return short if len(set(short)) == len(short) else folders


def require_replaceable(out: str) -> None:
    """Raise ValueError where a file that no comparison wrote has the name of one that would be written."""
    figures = _content(Path(f"{out}.json"))
    is_early = figures.keys() == {"measures", "curves"} and figures["measures"] == MEASURES  # before the format's name
    for name, is_ours in (
        (f"{out}.json", is_early or figures.get("format") == FORMAT),
        (f"{out}.png", _is_plot(Path(f"{out}.png"), _DRAWN_BY if is_early else FORMAT)),
    ):
        if os.path.lexists(name) and not is_ours:
            raise ValueError(f"{name} is there and no {PROGRAM} wrote it; give another --out, or move it away")
    require_own_manifest(f"{out}.run.json", PROGRAM, "--out")


def _is_plot(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark.encode() in file.read(_PLOT_HEAD)


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError:
        return {}


def write_outputs(out: str, curves: Sequence[RecallCurve]) -> tuple[str, ...]:
    """Write ``out`` with .json, and .png where matplotlib is installed; returns the files.

    Raises: ValueError as :func:`require_replaceable`.
    """
    require_replaceable(out)
    figures = {"format": FORMAT, "measures": MEASURES, "curves": [curve.to_dict() for curve in curves]}
    write_atomically(f"{out}.json", json.dumps(figures, indent=1) + "\n")
    return (f"{out}.json", *((f"{out}.png",) if _plot(f"{out}.png", curves) else ()))


def _plot(path: str, curves: Sequence[RecallCurve]) -> bool:
    """Draw recall by k, a row of panels per split and a line per folder; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plot: matplotlib is not installed (pip install 'fairseq-memory[plot]')")
        return False
    splits, names = list(dict.fromkeys(curve.split for curve in curves)), ("share", "any")
    figure = Figure(figsize=(9.0, 0.5 + 3.5 * len(splits)), layout="constrained")
    panels = figure.subplots(len(splits), len(names), squeeze=False)
    for split, row in zip(splits, panels):
        for name, axis in zip(names, row):
            of_split = [curve for curve in curves if curve.split == split]
            for curve, folder in zip(of_split, _names(of_split)):
                _line(axis, curve, name, folder)
            axis.set_xscale("log", base=2)
            axis.set_title(f"{split}: {MEASURES[name]}", fontsize="small")
            axis.set_xlabel("k")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    with writing(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Description": FORMAT})
    return True


def _line(axis: Any, curve: RecallCurve, name: str, folder: str) -> None:
    label = folder if curve.key_tap is None else f"{folder} ({curve.key_tap})"
    axis.plot([p.k for p in curve.points], [getattr(p, name) for p in curve.points], marker="o", label=label)

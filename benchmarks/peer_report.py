"""Tables, fronts and the picture of what ``peers.py`` measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]

RECALLS = (0.9, 0.99)
_LEAST_RECALL = 0.5  # of the picture
_SAME = 0.001  # by which recalls of 256 queries differ by chance
_MEMORY = 1.1  # times a peer's memory that a point of ours may take to be compared with it
# Bytes per key in widths of the key, and what a plot of indexes of that size is called.
_GROUPS = ((1.7, "whole keys"), (0.9, "a byte a column"), (0.0, "codes"))


def cpu() -> str:
    """The CPU's name and the instruction sets that decide how fast it searches."""
    from fairseq.runtime.manifest import hardware_facts

    facts = hardware_facts()
    return " ".join([facts["processor"] or "CPU", *facts["instructions"]])


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (recall, queries/s) those that no other one beats in both, by rising recall."""
    best: list[tuple[float, float]] = []
    for recall, speed in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not best or speed > best[-1][1]:
            best.append((recall, speed))
    return best[::-1]


def speed_at(points: Iterable[tuple[float, float]], recall: float) -> float | None:
    """Queries/s at a recall, geometric between the points of the front; None if none reaches it."""
    known = front(points)
    above = next((i for i, (reached, _) in enumerate(known) if reached >= recall), None)
    if above is None:
        return None
    if above == 0:
        return known[0][1]
    (low, fast), (high, slow) = known[above - 1 : above + 1]
    share = (recall - low) / (high - low)
    return math.exp((1 - share) * math.log(fast) + share * math.log(slow))


def exact_ratio(rows: Sequence[Row]) -> float:
    """Our exact search over the fastest exact peer: the smallest over models, threads and k; NaN if there are none."""
    ratios = []
    for _, group in _by(rows, "keys", "threads", "k", exact=True):
        ours = [row["queries_per_second"] for row in group if row["ours"]]
        peers = [row["queries_per_second"] for row in group if not row["ours"]]
        if ours and peers:
            ratios.append(max(ours) / max(peers))
    return min(ratios, default=math.nan)


def front_ratios(rows: Sequence[Row], k: int = 1024, threads: int = 1) -> list[Row]:
    """For each point of a peer our queries/s at its recall over its own, the smallest first; 0 if none reaches it.

    ``ratio`` is that of our points that take no more memory, ``index_ratio`` of those whose index is no larger,
    whatever their searches keep beside it.
    """
    found = []
    for _, group in _by([row for row in rows if row["k"] == k and row["threads"] == threads], "keys"):
        for row in group:
            if row["ours"] or row["exact"]:
                continue
            line = {name: row[name] for name in ("keys", "index", "recall", "effort", "queries_per_second")}
            for name, size in (("ratio", memory), ("index_ratio", lambda each: each["bytes_per_key"])):
                ours = [_point(each) for each in group if each["ours"] and size(each) <= _MEMORY * size(row)]
                line[name] = (speed_at(ours, row["recall"] - _SAME) or 0.0) / row["queries_per_second"]
            found.append(line | {"memory": memory(row)})
    return sorted(found, key=lambda line: line["ratio"])


def memory(row: Row) -> float:
    """Bytes per key of an index and of what its searches keep."""
    return float(row["bytes_per_key"] + row["kept_per_key"])


def _point(row: Row) -> tuple[float, float]:
    return row["recall"], row["queries_per_second"]


def _by(rows: Sequence[Row], *names: str, **wanted: Any) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows with the wanted values, grouped by others, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    yield from groups.items()


def tables(rows: Sequence[Row]) -> str:
    """Both tables in Markdown."""
    lines: list[str] = []
    head = "| keys | library, index | threads |"
    for exact in (True, False):
        counts = sorted({row["k"] for row in rows if row["exact"] is exact})
        if not counts:
            continue
        what = "k {}" if exact else "k {}, recall " + " / ".join(map(str, RECALLS))
        columns = [what.format(k) for k in counts] + (["recall"] if exact else ["highest recall at the largest k"])
        lines += ["", f"{head} {' | '.join(columns)} | bytes per key | build, s | CPU |"]
        lines.append("|---|---|---|" + "---|" * (len(columns) + 3))
        for (keys, index, threads), group in _by(rows, "keys", "index", "threads", exact=exact):
            cells = [_cell([row for row in group if row["k"] == k], exact=exact) for k in counts]
            cells.append(f"{_last_recall(group, exact=exact):.4f}")
            name = f"**{index}**" if group[0]["ours"] else index
            kept = max(row["kept_per_key"] for row in group)
            size = f"{group[0]['bytes_per_key']:.0f}" + (f" + {kept:.0f}" if kept else "")
            sizes = f"{size} | {group[0]['build_seconds']:.1f}"
            lines.append(f"| {keys} | {name} | {threads} | {' | '.join(cells)} | {sizes} | {group[0]['cpu']} |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[Row], *, exact: bool) -> str:
    """Queries/s at one k."""
    if exact:
        return f"{rows[0]['queries_per_second']:.0f}" if rows else "-"
    speeds = [speed_at(map(_point, rows), recall) for recall in RECALLS]
    return " / ".join("-" if speed is None else f"{speed:.0f}" for speed in speeds)


def _last_recall(rows: Sequence[Row], *, exact: bool) -> float:
    if exact:
        return min(row["recall"] for row in rows)
    largest = max(row["k"] for row in rows)
    return max(row["recall"] for row in rows if row["k"] == largest)


def plot(rows: Sequence[Row], path: str, k: int = 1024, threads: int = 1) -> None:
    """Recall and queries/s of all indexes, a row of plots for each model and a plot for each size of the memory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # as text, which takes a tenth of the bytes
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    from matplotlib import pyplot

    rows = [row for row in rows if row["k"] == k and row["threads"] == threads]
    models = list(dict.fromkeys(row["keys"] for row in rows if not row["exact"]))
    if not models:
        raise ValueError(f"no approximate index was measured at k {k} on {threads} thread; nothing to draw")
    shape = (len(models), len(_GROUPS))
    figure, axes = pyplot.subplots(*shape, figsize=(4.4 * shape[1], 4.6 * shape[0]), squeeze=False)
    for (at, model), (column, (_, words)) in itertools.product(enumerate(models), enumerate(_GROUPS)):
        axis = axes[at][column]
        axis.set_title(f"{model}, {words}", fontsize=9)
        axis.set_yscale("log")
        axis.set_xlabel(f"recall@{k}", fontsize=8)
        axis.set_ylabel(f"queries/s, {threads} thread", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, which="both")
        for (index,), group in _by(rows, "index", keys=model):
            if _group(group[-1]) == column:
                _draw(axis, index, group)
        axis.set_xlim(_LEAST_RECALL, 1.01)
        if axis.lines:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def _group(row: Row) -> int:
    widths = memory(row) / row["dim"]
    return next(at for at, (least, _) in enumerate(_GROUPS) if widths >= least)


def _draw(axis: Any, index: str, rows: Sequence[Row]) -> None:
    """The front of one index; ours with thick lines and filled marks."""
    points = [point for point in front(map(_point, rows)) if point[0] >= _LEAST_RECALL]
    if not points:
        return
    style = {"linewidth": 2.2, "marker": "o"} if rows[0]["ours"] else {"linewidth": 0.9, "marker": "x"}
    label = f"{index} ({memory(rows[-1]):.0f} B)"
    axis.plot(*zip(*points), markersize=4, label=label, **style)

"""The files a sweep leaves: every setting as JSON and CSV, and a heat map."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fairseq.runtime.atomic_files import write_atomically, writing
from fairseq.runtime.manifest import write_manifest

if TYPE_CHECKING:
    from fairseq.memory.retrieval.sweep import Result, Setting

logger = logging.getLogger(__name__)


def write_outputs(
    out: str,
    results: Sequence[Result],
    best: Result,
    figures: dict[str, Any],
    *,
    argv: Sequence[str],
    config: dict[str, Any],
    inputs: Sequence[str],
) -> None:
    """Write ``out`` with .json, .csv, .png (where matplotlib is installed) and the run manifest."""
    rows = [{name: _finite(value) for name, value in result.to_dict().items()} for result in results]
    write_atomically(f"{out}.json", json.dumps(figures | {"settings": rows}, indent=1, default=_finite) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(f"{out}.csv", text.getvalue())
    drawn = _heat_map(f"{out}.png", results, best, str(figures["tuned_on"]))
    write_manifest(
        f"{out}.run.json", program="fairseq-knn-sweep", argv=argv, config=config, figures=figures, inputs=inputs
    )
    logger.info("%s.json, .csv%s: %d settings", out, ", .png" if drawn else "", len(rows))


def _finite(value: object) -> object:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _heat_map(path: str, results: Sequence[Result], best: Result, subset: str) -> bool:
    """Draw perplexity by share and temperature, one panel per number of neighbours; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no heat map: matplotlib is not installed (pip install 'fairseq-memory[plot]')")
        return False
    panels: dict[str, dict[tuple[float, float], float]] = {}
    for result in results:
        sums, (title, place) = result.sums, _place(result.setting)
        panels.setdefault(title, {})[place] = math.nan if sums.num_impossible else sums.perplexity
    figure = Figure(figsize=(min(40.0, 2.0 + 4.5 * len(panels)), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    finite = [value for panel in panels.values() for value in panel.values() if math.isfinite(value)]
    across = "k" if best.setting.weight is None else "lambda"
    best_title, best_place = _place(best.setting)
    for axis, (title, panel) in zip(axes, panels.items()):
        image = _draw(axis, panel, across, (min(finite, default=0.0), max(finite, default=1.0)))
        axis.set_title(title)
        if title == best_title:
            _mark(axis, panel, best_place)
    figure.colorbar(image, ax=axes, label="perplexity")
    figure.suptitle(f"perplexity on {subset}; best: {best.setting.flags()}", fontsize="medium")
    with writing(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120)
    return True


def _place(setting: Setting) -> tuple[str, tuple[float, float]]:
    """The panel that shows a setting, and its place there: temperature, and share or number of neighbours."""
    k, joint = setting.k, setting.joint_temperature
    if setting.weight is None:
        return "joint normalisation", (setting.temperature, float(k))
    title = f"k {k}" if joint is None else f"k {k}, joint temperature {joint:g}"
    return title, (setting.temperature, setting.weight)


def _draw(axis: Any, panel: dict[tuple[float, float], float], across: str, limits: tuple[float, float]) -> Any:
    temperatures, columns = (sorted(set(values)) for values in zip(*panel))
    image = axis.imshow(
        [[panel[temperature, column] for column in columns] for temperature in temperatures],
        aspect="auto",
        origin="lower",
        vmin=limits[0],
        vmax=limits[1],
        cmap="viridis_r",
    )
    for places, values, name in ((axis.xaxis, columns, across), (axis.yaxis, temperatures, "temperature")):
        step = max(1, -(-len(values) // 10))
        places.set_ticks(range(0, len(values), step), [f"{value:g}" for value in values[::step]])
        places.set_label_text(name)
    return image


def _mark(axis: Any, panel: dict[tuple[float, float], float], place: tuple[float, float]) -> None:
    temperatures, columns = (sorted(set(values)) for values in zip(*panel))
    axis.plot(columns.index(place[1]), temperatures.index(place[0]), marker="*", color="red", markersize=14)

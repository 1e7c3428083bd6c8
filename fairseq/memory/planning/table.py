"""The table that fairseq-datastore plan prints."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairseq.memory.planning.config import PlanConfig
    from fairseq.memory.planning.estimate import Plan, Rates

_HEAD = ("index", "disk", "building", "memory", "building", "GPU", "build", "search", "queries/s")


def table(config: PlanConfig, rates: Rates, estimate: Plan, memory_bytes: int) -> str:
    """Lines about the store and the machine, and a table of the ways to search."""
    free = shutil.disk_usage(config.folder).free
    lines = [
        f"store: {config.keys} keys of {config.dim} {config.dtype}: {_bytes(estimate.store_bytes)}, written in "
        f"{_time(estimate.write_seconds)} (without the model's time)",
        f"here: {_bytes(memory_bytes)} of memory, {_bytes(free)} of disk free; read {_bytes(rates.read_bytes)}/s, "
        f"write {_bytes(rates.write_bytes)}/s, products {rates.matmul / 1e9:.0f} GFLOP/s",
        f"search: {config.queries} queries, k {config.k}, --probe {config.probe} of --ncentroids {config.ncentroids}",
        "",
    ]
    rows: list[tuple[str, ...]] = [_HEAD]
    for choice in estimate.choices:
        rate = config.queries / choice.search_seconds if choice.search_seconds else None
        sizes = (choice.disk, choice.disk_building, choice.memory, choice.memory_building, choice.gpu_memory)
        limits = (free, free, memory_bytes, memory_bytes, None)
        marked = [_bytes(size) + ("!" if limit and size > limit else "") for size, limit in zip(sizes, limits)]
        times = [_time(choice.build_seconds), _time(choice.search_seconds), f"{rate:.0f}" if rate else "-"]
        rows.append((choice.kind, *marked, *times))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells))
    if estimate.store_bytes > free:
        lines.append(f"the store does not fit on the disk of {config.folder!r}; 16-bit keys (--dtype float16) halve it")
    if any("!" in cell for row in rows[1:] for cell in row):
        lines.append("!: more than this machine has")
    if any(choice.build_seconds is None for choice in estimate.choices):
        lines.append("-: not measured, this build_dstore.py cannot build the kind")
    return "\n".join(lines) + "\n"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"

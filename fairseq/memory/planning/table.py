"""The table that fairseq-datastore plan prints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairseq.memory.planning.config import PlanConfig
    from fairseq.memory.planning.estimate import Plan, Rates

_HEAD = ("index", "disk", "building", "memory", "building", "GPU", "build", "search", "queries/s")


def table(config: PlanConfig, rates: Rates, estimate: Plan, memory_bytes: int) -> str:
    """Lines about the store and the machine, and a table of the ways to search."""
    free = shutil.disk_usage(config.folder).free
    lines = [
        f"store: {config.keys} keys of {config.dim} {config.dtype}: {shown_bytes(estimate.store_bytes)}, written in "
        f"{_time(estimate.write_seconds)} (without the model's time)",
        f"here: {shown_bytes(memory_bytes)} of memory, {shown_bytes(free)} of disk free; read "
        f"{shown_bytes(rates.read_bytes)}/s, write {shown_bytes(rates.write_bytes)}/s, products "
        f"{rates.matmul / 1e9:.0f} GFLOP/s",
        f"search: {config.queries} queries, k {config.k}, --probe {config.probe} of --ncentroids {config.ncentroids}",
        "",
    ]
    rows: list[tuple[str, ...]] = [_HEAD]
    for choice in estimate.choices:
        rate = config.queries / choice.search_seconds if choice.search_seconds else None
        sizes = (choice.disk, choice.disk_building, choice.memory, choice.memory_building, choice.gpu_memory)
        limits = (free, free, memory_bytes, memory_bytes, None)
        marked = [shown_bytes(size) + ("!" if limit and size > limit else "") for size, limit in zip(sizes, limits)]
        times = [_time(choice.build_seconds), _time(choice.search_seconds), f"{rate:.0f}" if rate else "-"]
        rows.append((choice.kind, *marked, *times))
    lines += aligned(rows)
    if estimate.store_bytes > free:
        lines.append(f"the store does not fit on the disk of {config.folder!r}; 16-bit keys (--dtype float16) halve it")
    if any("!" in cell for row in rows[1:] for cell in row):
        lines.append("!: more than this machine has")
    if any(choice.build_seconds is None for choice in estimate.choices):
        lines.append("-: not measured, this build_dstore.py cannot build the kind")
    return "\n".join(lines) + "\n"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def shown_bytes(count: float) -> str:
    """A number of bytes with three digits."""
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

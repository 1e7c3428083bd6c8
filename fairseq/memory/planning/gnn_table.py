"""The tables of GNN-LM's cost that fairseq-datastore plan prints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fairseq.memory.planning.table import aligned, shown_bytes

if TYPE_CHECKING:
    from fairseq.memory.planning.config import PlanConfig
    from fairseq.memory.planning.gnn_estimate import GnnPlan


def gnn_table(config: PlanConfig, made: GnnPlan) -> str:
    """Lines about GNN-LM's files, searches and training, with what was measured and what was not."""
    free = shutil.disk_usage(config.folder).free
    left, right = config.graph.neighbor_context
    source = "--flops, not measured" if config.flops else "of a float32 product measured here"
    lines = [
        "",
        f"GNN-LM over {config.keys} positions of width {config.dim}: {config.graph_layers} layers, "
        f"{config.graph_heads} heads, windows of {left} and {right} positions, codes of {config.gnn_code_bytes} bytes, "
        f"blocks of {config.gnn_tokens} tokens, {config.gnn_distinct:g} of the neighbours distinct",
        "",
        *aligned(_files(made, free)),
        "(hours of reading, computing and writing, at measured rates; without the language model, which makes the "
        "features, and without training a codec)",
        "",
        *aligned(_searches(made)),
        f"(all train positions, --probe {config.probe} of --ncentroids {config.ncentroids}, at rates measured for each "
        "k; commands with --num-shards share it)",
        "",
        *aligned(_training(config, made)),
        f"(an epoch at {made.flops / 1e9:,.0f} GFLOP/s, {source})",
    ]
    if any("!" in line for line in lines):
        lines.append("!: more than the disk has free")
    return "\n".join(lines) + "\n"


def _hours(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 3600:.3g} h"


def _files(made: GnnPlan, free: int) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("file", "disk", "time")]
    for part in made.parts:
        rows.append((part.name, shown_bytes(part.bytes) + ("!" if part.bytes > free else ""), _hours(part.seconds)))
    for depth in made.depths:
        size = depth.neighbors.bytes
        rows.append((depth.neighbors.name, shown_bytes(size) + ("!" if size > free else ""), "see below"))
    return rows


def _searches(made: GnnPlan) -> Sequence[tuple[str, ...]]:
    kinds = list(made.depths[0].search_seconds)
    rows: list[tuple[str, ...]] = [("search", *kinds)]
    for depth in made.depths:
        rows.append((f"k {depth.k}", *(_hours(depth.search_seconds[kind]) for kind in kinds)))
    return rows


def _training(config: PlanConfig, made: GnnPlan) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("training", "GFLOP/token", "PFLOP/epoch", "epoch", "features read/token", "as codes")
    ]
    for depth in made.depths:
        epoch = depth.training_flop * config.keys / 1e15
        read = [shown_bytes(depth.feature_bytes[kind]) for kind in ("float16", "codes")]
        cells = (f"{depth.training_flop / 1e9:.3g}", f"{epoch:.3g}", _hours(depth.epoch_seconds))
        rows.append((f"k {depth.k}", *cells, *read))
    return rows

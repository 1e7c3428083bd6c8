"""How good an index is: what it finds of the true neighbours, how fast, and what it takes.

The keys of some rows are the queries, rows that training has not seen where there are such; a row is never its own
neighbour.

Shapes: N queries, K neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.index.base import Index
from fairseq.memory.index.build.build import BuiltIndex, rows_seen
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.files import BuildFiles
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex, about_index, lists_of
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.files import write_json

logger = logging.getLogger(__name__)


def report(config: BuildConfig, store: Datastore, built: BuiltIndex) -> dict[str, Any]:
    """Measure a finished index and keep the figures in the file beside it; what was measured before is told again.

    Returns: ``k``, ``queries``, ``held_back`` (whether training saw none of the queries), ``bytes_per_key``,
    ``build_seconds``, and ``probes``: a list of ``probe``, ``recall`` and ``queries_per_second``.
    """
    files = BuildFiles.of(config)
    about = about_index(files.index)
    asked: dict[str, Any] = {"queries": config.report_queries, "k": config.report_k, "probes": _probes(config)}
    asked["deleted"] = len(store.deleted)
    if about.get("report", {}).get("asked") == asked:
        told: dict[str, Any] = about["report"]
        return told
    metric = Metric.parse(config.dist)
    index = FaissIndex.open(files.index, metric, mapped=config.on_disk, deleted=store.deleted)
    if not config.use_faiss_cpu:
        index.use_gpus()
    rows, held_back = _query_rows(config, store, index.deleted, rows_seen(config, store))
    k = min(config.report_k, index.num_alive - 1)
    figures: dict[str, Any] = {"asked": asked, "k": k, "queries": len(rows), "held_back": held_back}
    figures |= {"bytes_per_key": built.bytes / built.rows, "build_seconds": built.train_seconds + built.add_seconds}
    if k >= 1:
        figures["probes"] = measured(index, store, torch.from_numpy(rows), k, _probes(config))
    write_json(files.about, about | {"report": figures})
    return figures


def recall(found_NK: Tensor, truth_NK: Tensor) -> float:
    """Share of the true neighbours that were found, mean over the queries."""
    shares = [np.isin(truth, found).mean() for truth, found in zip(truth_NK.numpy(), found_NK.numpy())]
    return float(np.mean(shares)) if shares else 1.0


def _probes(config: BuildConfig) -> list[int]:
    return sorted({config.probe, *config.report_probes})


def _query_rows(config: BuildConfig, store: Datastore, gone: Array, seen: Array) -> tuple[Array, bool]:
    """Rows whose keys are the queries, rising; and whether training saw none of them."""
    draw = np.random.default_rng([config.seed, 1])
    wanted = config.report_queries
    # Drawn rather than listed: a store may have a hundred million rows.
    drawn = np.setdiff1d(draw.integers(0, len(store), 4 * wanted), gone)
    others = np.setdiff1d(drawn, seen)
    held_back = len(others) >= min(wanted, len(drawn)) // 2 and len(others) > 0
    chosen = others if held_back else drawn
    if not len(chosen):
        chosen = np.setdiff1d(np.arange(min(len(store), 4 * wanted + len(gone))), gone)
    rows: Array = np.sort(draw.permutation(chosen)[:wanted])
    return rows, held_back


def measured(index: FaissIndex, store: Datastore, rows: Tensor, k: int, probes: Sequence[int]) -> list[dict[str, Any]]:
    """What an index finds of the k true neighbours of some rows, and how fast, for several probes."""
    query_ND = store.keys.take(rows)
    exact = ExactIndex(store.keys, index.metric, deleted=index.deleted)
    truth_NK = _others(exact, query_ND, rows, k)
    lists = lists_of(index.inner)
    tried = sorted({min(probe, lists.nlist) for probe in probes}) if lists is not None else [probes[0]]
    found = []
    for probe in tried:
        index.set_probe(probe)
        found_NK = _others(index, query_ND, rows, k)
        started = time.perf_counter()  # the second time, so that what is read once for many searches is not counted
        index.search(query_ND, k)
        seconds = time.perf_counter() - started
        found.append(
            {
                "probe": probe,
                "recall": recall(found_NK, truth_NK),
                "queries_per_second": len(rows) / max(seconds, 1e-9),
            }
        )
        logger.info("probe %d: recall@%d %.4f", probe, k, found[-1]["recall"])
    return found


def _others(index: Index, query_ND: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k nearest rows of each, itself left out."""
    found: Neighbors = index.search(query_ND, k + 1)
    is_self_NK = found.ids_NK == rows[:, None]
    # Where equal keys push a row out of its own neighbours, the last one goes.
    is_self_NK[:, -1] |= ~is_self_NK.any(1)
    return found.ids_NK[~is_self_NK].view(len(rows), k)

"""Quality of an index: recall of the true neighbours, speed, size and building time.

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
from fairseq.memory.index.faiss.index import FaissIndex, index_metadata, lists_of
from fairseq.memory.types import Array, Metric, Neighbors
from fairseq.runtime.files import write_json
from fairseq.runtime.records import seal

logger = logging.getLogger(__name__)


def report(config: BuildConfig, store: Datastore, built: BuiltIndex) -> dict[str, Any]:
    """Measure a finished index and keep the figures in the file beside it; earlier figures of the same options are
    returned.

    Returns: ``k``, ``queries``, ``held_back`` (whether training saw none of the queries), ``bytes_per_key``,
    ``build_seconds``, and ``probes``: a list of ``probe``, ``recall`` and ``queries_per_second``.
    """
    files = BuildFiles.of(config)
    metadata = index_metadata(files.index)
    asked: dict[str, Any] = {"queries": config.report_queries, "k": config.report_k, "probes": _probes(config)}
    asked["deleted"] = len(store.deleted)
    if metadata.get("report", {}).get("asked") == asked:
        earlier: dict[str, Any] = metadata["report"]
        return earlier
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
    write_json(files.metadata, seal(metadata | {"report": figures}))
    return figures


def recall(found_NK: Tensor, truth_NK: Tensor) -> float:
    """Share of the true neighbours that were found, mean over the queries."""
    shares = [np.isin(truth, figures).mean() for truth, figures in zip(truth_NK.numpy(), found_NK.numpy())]
    return float(np.mean(shares)) if shares else 1.0


def _probes(config: BuildConfig) -> list[int]:
    return sorted({config.probe, *config.report_probes})


def _query_rows(config: BuildConfig, store: Datastore, deleted: Array, seen: Array) -> tuple[Array, bool]:
    """Rows whose keys are the queries, rising; and whether training saw none of them."""
    draw = np.random.default_rng([config.seed, 1])
    wanted = config.report_queries
    # Drawn rather than listed: a store may have a hundred million rows.
    drawn = np.setdiff1d(draw.integers(0, len(store), 4 * wanted), deleted)
    unseen = np.setdiff1d(drawn, seen)
    held_back = len(unseen) >= min(wanted, len(drawn)) // 2 and len(unseen) > 0
    queries = unseen if held_back else drawn
    if not len(queries):
        queries = np.setdiff1d(np.arange(min(len(store), 4 * wanted + len(deleted))), deleted)
    rows: Array = np.sort(draw.permutation(queries)[:wanted])
    return rows, held_back


def measured(index: FaissIndex, store: Datastore, rows: Tensor, k: int, probes: Sequence[int]) -> list[dict[str, Any]]:
    """Recall of the k true neighbours of some rows, and speed, for several probes."""
    query_ND = store.keys.take(rows)
    exact = ExactIndex(store.keys, index.metric, deleted=index.deleted)
    truth_NK = _other_neighbors(exact, query_ND, rows, k)
    lists = lists_of(index.inner)
    tried = sorted({min(probe, lists.nlist) for probe in probes}) if lists is not None else [probes[0]]
    figures = []
    for probe in tried:
        index.set_probe(probe)
        found_NK = _other_neighbors(index, query_ND, rows, k)
        started = time.perf_counter()  # the second time, so that what is read once for many searches is not counted
        index.search(query_ND, k)
        seconds = time.perf_counter() - started
        figures.append(
            {
                "probe": probe,
                "recall": recall(found_NK, truth_NK),
                "queries_per_second": len(rows) / max(seconds, 1e-9),
            }
        )
        logger.info("probe %d: recall@%d %.4f", probe, k, figures[-1]["recall"])
    return figures


def _other_neighbors(index: Index, query_ND: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k nearest rows of each, itself excluded."""
    figures: Neighbors = index.search(query_ND, k + 1)
    is_self_NK = figures.ids_NK == rows[:, None]
    # Where equal keys push a row out of its own neighbours, the last one goes.
    is_self_NK[:, -1] |= ~is_self_NK.any(1)
    return figures.ids_NK[~is_self_NK].view(len(rows), k)

"""Makes clusters of a datastore's rows in two steps, each of which survives a kill: k-means on a sample, then sorting.

Sorting appends the cluster of each row to a file, so that no row is dropped or sorted twice.

Shapes: R rows of the store, C clusters, D width.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.reading.read_ahead import iter_blocks
from fairseq.memory.index.kmeans.kmeans import Assigner, kmeans, sample_size
from fairseq.memory.retomaton.cluster_config import ClusterConfig
from fairseq.memory.retomaton.clusters import Clusters, store_mark
from fairseq.memory.types import Array
from fairseq.runtime.arrays import read_array
from fairseq.runtime.atomic_files import naming, writing
from fairseq.runtime.files import DAMAGED, locked, may_create_in, write_json
from fairseq.runtime.records import OBJECT, WHOLE, Fields, read_record

logger = logging.getLogger(__name__)

_PROGRESS = Fields({"signature": OBJECT, "rows_done": WHOLE})

# Rows are sorted in blocks that start at multiples of this, wherever a killed run stopped.
_BLOCK_ROWS = 1 << 17
_ROWS_PER_CLUSTER = 100


@dataclass(frozen=True)
class BuiltClusters:
    """Summary of the clusters that were made."""

    path: Path
    rows: int
    num_clusters: int
    sampled: int
    """Keys the clusters were learned from."""
    seconds: float


@dataclass(frozen=True)
class _Files:
    """The names a run uses; all but the first are gone when it has ended."""

    clusters: Path
    centroids: Path
    sorted: Path
    progress: Path
    lock: Path

    @classmethod
    def of(cls, path: Path) -> _Files:
        return cls(
            path, *(Path(f"{path}{end}") for end in (".centroids.npy", ".sorted.tmp", ".progress.json", ".lock"))
        )


def open_clustered_store(config: ClusterConfig) -> Datastore:
    """Open the datastore. Raises: ValueError when it is missing or of another size or width than stated."""
    hints = StoreHints(config.dimension, config.dstore_size, config.dstore_fp16, config.dstore_bf16)
    store = Datastore.open(config.dstore_mmap, hints)
    if config.dimension not in (None, store.dim):
        raise ValueError(
            f"--dimension {config.dimension} is not the width of datastore {store.prefix!r}, {store.dim}: leave it out"
        )
    return store.require(size=config.dstore_size)


def build_clusters(config: ClusterConfig) -> BuiltClusters:
    """Make the clusters a config describes, resuming an interrupted run of the same.

    Raises: ValueError or OSError when something cannot work, before any long work.
    """
    began = time.perf_counter()
    store = open_clustered_store(config)
    count = config.num_clusters or max(1, len(store) // _ROWS_PER_CLUSTER)
    sampled = sample_size(len(store), count, config.sample_size)
    _check(store, count, sampled)
    may_create_in(config.path.parent)
    files = _Files.of(config.path)
    mark = store_mark(store)
    signature = {"store": mark, "rows": len(store), "num_clusters": count, "sampled": sampled, "seed": config.seed}
    signature["iterations"] = config.cluster_iterations
    with locked(files.lock, f"clusters {str(files.clusters)!r}"):
        if _complete(files, signature):
            logger.info("%s is complete already; remove it to make it again", files.clusters)
        else:
            centroids_CD = _centroids(config, store, files, signature)
            cluster_R = _sorted(store, files, signature, centroids_CD)
            made = Clusters.of_assignment(cluster_R, count, mark)
            made.save(files.clusters, {"signature": np.array(repr(signature))})
        for path in (files.centroids, files.sorted, files.progress):
            path.unlink(missing_ok=True)
    return BuiltClusters(files.clusters, len(store), count, sampled, time.perf_counter() - began)


def _check(store: Datastore, count: int, sampled: int) -> None:
    if count > len(store):
        raise ValueError(
            f"--num_clusters {count} is more than the datastore's {len(store)} rows; give about "
            f"{max(1, len(store) // _ROWS_PER_CLUSTER)}"
        )
    if sampled < count:
        raise ValueError(f"--sample_size {sampled} is less than --num_clusters {count}; raise it")
    needed = 6 * sampled * store.dim  # float32 keys, and 8 bits of them in products
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > held:
        raise ValueError(
            f"a sample of {sampled} keys takes about {needed >> 20} MB, this machine has {held >> 20}; give a smaller "
            "--sample_size"
        )


def _complete(files: _Files, signature: Mapping[str, Any]) -> bool:
    if not files.clusters.exists():
        return False
    # A damaged file is reported, not overwritten.
    return Clusters.read(files.clusters).signature == repr(dict(signature))


def _centroids(config: ClusterConfig, store: Datastore, files: _Files, signature: Mapping[str, Any]) -> Tensor:
    """The centroids of an interrupted run, or new ones, which are put on disk."""
    if files.progress.exists() and files.centroids.exists():
        if read_record(files.progress, _PROGRESS)["signature"] == signature:
            held_CD = read_array(files.centroids, "is not an array of centroids")
            if held_CD.dtype == np.float32 and held_CD.shape == (signature["num_clusters"], store.dim):
                return torch.from_numpy(held_CD)
            raise ValueError(f"{files.centroids} is damaged: {held_CD.dtype} {held_CD.shape}; {DAMAGED}")
        logger.warning("%s: another command left an unfinished run; it is thrown away", files.clusters)
    rows = np.random.default_rng(config.seed).choice(len(store), signature["sampled"], replace=False)
    keys_ND = store.keys.take(np.sort(rows))
    wrong = nonfinite(keys_ND)
    if len(wrong):
        raise ValueError(
            f"key {int(np.sort(rows)[wrong[0]])} of datastore {store.prefix!r} holds NaN or infinity; "
            "fairseq-datastore convert --drop-nonfinite leaves such rows out"
        )
    logger.info("%d clusters of %d sampled keys", signature["num_clusters"], len(keys_ND))
    centroids_CD = kmeans(keys_ND, signature["num_clusters"], seed=config.seed, iterations=config.cluster_iterations)
    with writing(files.centroids, binary=True) as file:
        np.save(file, centroids_CD.numpy())
    files.sorted.unlink(missing_ok=True)
    write_json(files.progress, {"signature": signature, "rows_done": 0})
    return centroids_CD


def _sorted(store: Datastore, files: _Files, signature: Mapping[str, Any], centroids_CD: Tensor) -> Array:
    """The cluster of each row; those an interrupted run has sorted are read."""
    done = read_record(files.progress, _PROGRESS)["rows_done"] if files.sorted.exists() else 0
    if done and files.sorted.stat().st_size < 4 * done:
        logger.warning("%s is shorter than its progress file says; sorting again", files.sorted)
        done = 0
    if done:
        logger.info("resuming at row %d of %d", done, len(store))
    nearest = Assigner(centroids_CD)
    with naming(files.sorted), open(files.sorted, "r+b" if done else "wb") as file:
        file.truncate(4 * done)
        file.seek(4 * done)
        for start, rows_ND in iter_blocks(store.keys, _BLOCK_ROWS, done):
            block_ND = rows_ND.float()
            wrong = nonfinite(block_ND)
            if len(wrong):  # such a row is in no cluster
                block_ND = block_ND.index_fill(0, wrong, 0.0)
            cluster_N = nearest(block_ND).int().index_fill(0, wrong, -1)
            file.write(cluster_N.numpy().data)
            file.flush()
            os.fsync(file.fileno())
            write_json(files.progress, {"signature": signature, "rows_done": start + len(block_ND)})
            logger.info("sorted %d of %d keys", start + len(block_ND), len(store))
    cluster_R = np.fromfile(files.sorted, np.int32)
    if len(cluster_R) != len(store):
        raise ValueError(
            f"{files.sorted} holds {len(cluster_R)} rows, the datastore {len(store)}; remove it, run again"
        )
    return cluster_R

"""Speed of this machine at the steps of a plan: a few seconds per step, on random keys of the planned width."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.datastore.reading.read_ahead import iter_blocks
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build.build import build_index
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.exact.index import FEW_PRODUCTS, ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.planning.config import PlanConfig
from fairseq.memory.planning.estimate import KMEANS_PASSES, SIZES, IndexRates, Rates, records
from fairseq.memory.types import Array, Metric
from fairseq.runtime.hardware import fits_in_ram

logger = logging.getLogger(__name__)

_LISTS = 16
_FEW_KEYS = 10_240  # for training: faiss asks for 39 per value of a code, of which there are 256
_DISK_BYTES = 256 << 20
_READ_BYTES = 4 << 20
_LONG_READING = 8.0  # seconds, for a store that must be read again and again
_KEY_BYTES = 64 << 20
_CENTERS = 64


def measure(config: PlanConfig) -> Rates:
    """Measure on this machine; files go to a temporary folder within ``config.folder``.

    Raises: OSError when the folder cannot be written.
    """
    return measure_each(config, (config.k,))[config.k]


def measure_each(config: PlanConfig, ks: Sequence[int]) -> dict[int, Rates]:
    """As :func:`measure`, with searches for each of some numbers of neighbours."""
    rng = np.random.default_rng(1)
    rows = int(np.clip(_KEY_BYTES // (4 * config.dim), 2 * _FEW_KEYS, 32_768))
    keys = random_keys(rng, 2 * rows, config.dim)
    query_ND = torch.from_numpy(random_keys(rng, 1024, config.dim))
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=config.folder) as temporary:
        folder = Path(temporary)
        store = config.keys * config.dim * KEY_DTYPES[config.dtype].itemsize
        write, read = disk_rates(folder / "bytes", *([] if fits_in_ram(store) else [_LONG_READING]))
        _save(folder / "small", keys[:rows])
        _save(folder / "large", keys)
        indexes = {"flat": _flat(folder, config, query_ND, rows, ks)}
        # A flat search for one neighbour finds the nearest centroid.
        assign = len(query_ND) * rows * config.dim / _search(folder, "small", "flat", query_ND, (1,), 1)[1]
        for kind in sorted(SIZES.keys() & INDEXES.keys() - indexes.keys()):
            logger.info("measuring %s", kind)
            indexes[kind] = _with_lists(folder, kind, config, query_ND, rows, assign, ks)
    exact = {k: _exact(keys, rows, query_ND, k) for k in ks}
    matmul = _matmul(config.dim)
    by_kind = {k: {kind: rates[k] for kind, rates in indexes.items()} for k in ks}
    return {k: Rates(read, write, matmul, assign, *exact[k][:2], by_kind[k], exact[k][2]) for k in ks}


def random_keys(rng: np.random.Generator, rows: int, dim: int) -> Array:
    """Keys in clusters, as those of text are."""
    centers = rng.standard_normal((_CENTERS, dim), dtype=np.float32)
    keys = 0.7 * rng.standard_normal((rows, dim), dtype=np.float32) + centers[rng.integers(0, _CENTERS, rows)]
    return np.asarray(keys, np.float32)


def seconds_of(call: Callable[[], Any]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def disk_rates(path: Path, reading: float = 1.0) -> tuple[float, float]:
    """Bytes per second written (synced to disk), and read as a store larger than memory is read.

    Args:
        reading: seconds; a virtual disk may begin faster than it goes on.
    """
    block = np.random.default_rng(0).bytes(16 << 20)

    def write() -> None:
        with open(path, "wb") as file:
            for _ in range(_DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    try:
        return _DISK_BYTES / seconds_of(write), read_rate(path, reading)
    finally:
        path.unlink(missing_ok=True)


def read_rate(path: Path, seconds: float = 0.0, past: int | None = None) -> float:
    """Bytes per second of reading a file in order as a store larger than memory is read.

    Args:
        seconds: it is read again until so much time has gone by; the rate is that of the second half.
        past: bytes that are read of it; None for all.
    """
    size = min(past or path.stat().st_size, path.stat().st_size)
    block = min(_READ_BYTES, size)
    keys = ChunkedArray([np.memmap(path, np.uint8, "r", shape=(size // block, block))], exceeds_ram=True)
    began, done = time.perf_counter(), [(0.0, 0)]
    while len(done) == 1 or done[-1][0] < seconds:
        for _, rows in iter_blocks(keys, 1):
            done.append((time.perf_counter() - began, done[-1][1] + rows.nbytes))
    middle = next(past for past in done if past[0] >= (done[-1][0] / 2 if seconds else 0))
    return (done[-1][1] - middle[1]) / (done[-1][0] - middle[0])


def _matmul(dim: int) -> float:
    left, right = torch.ones(2048, dim), torch.ones(dim, 4096)
    left @ right
    return 2 * 2048 * 4096 * dim / min(seconds_of(lambda: left @ right) for _ in range(3))


def _save(prefix: Path, keys: Array) -> None:
    with DatastoreWriter(prefix, len(keys), keys.shape[1]) as writer:
        writer.append(keys, np.zeros(len(keys), np.int64))
        writer.finish()


def _build(folder: Path, store: str, kind: str, config: PlanConfig, train_size: int) -> tuple[float, float]:
    """Seconds of training and of adding keys; the index is ``folder/store.kind.l2``."""
    report = build_index(
        BuildConfig(
            dstore_mmap=str(folder / store),
            faiss_index=str(folder / f"{store}.{kind}"),
            index=kind,
            ncentroids=_LISTS,
            code_size=config.code_size,
            train_size=train_size,
        )
    )
    return report.train_seconds, report.add_seconds


def _search(folder: Path, store: str, kind: str, query_ND: Tensor, ks: Sequence[int], probe: int) -> dict[int, float]:
    """Seconds of a search for each k, the faster of two, after one that builds tables for all of them."""
    index = FaissIndex.open(folder / f"{store}.{kind}", Metric.L2)
    index.set_probe(probe)

    def search(k: int) -> float:
        return seconds_of(lambda: index.search(query_ND, min(k, len(index))))

    search(ks[0])
    return {k: min(search(k) for _ in range(2)) for k in ks}


def _flat(folder: Path, config: PlanConfig, query_ND: Tensor, rows: int, ks: Sequence[int]) -> Mapping[int, IndexRates]:
    small, large = (_build(folder, store, "flat", config, rows)[1] for store in ("small", "large"))
    adding = IndexRates(0.0, 0.0, max(0.0, (large - small) / rows), 0.0, 0.0)
    times = [_search(folder, store, "flat", query_ND, ks, 1) for store in ("small", "large")]
    rates = {}
    for k in ks:
        scan, query = _line([found[k] for found in times], (rows, 2 * rows), len(query_ND))
        rates[k] = replace(adding, scan_key=scan, query=query)
    return rates


def _with_lists(
    folder: Path, kind: str, config: PlanConfig, query_ND: Tensor, rows: int, assign: float, ks: Sequence[int]
) -> Mapping[int, IndexRates]:
    # Two sizes separate the fixed cost (files, locks, waking threads) from the cost per key.
    training, small = _build(folder, "small", kind, config, rows)
    less_training, large = _build(folder, "large", kind, config, _FEW_KEYS)
    centroids = _LISTS * config.dim / assign
    own = [t - n * KMEANS_PASSES * centroids for t, n in ((less_training, _FEW_KEYS), (training, rows))]
    train_key, train = _line(own, (_FEW_KEYS, rows), 1)
    building = IndexRates(train, train_key, max(0.0, (large - small) / rows - centroids), 0.0, 0.0)
    times = [_search(folder, "large", kind, query_ND, ks, probe) for probe in (1, _LISTS)]
    rates = {}
    for k in ks:
        scan, query = _line([found[k] for found in times], (2 * rows / _LISTS, 2 * rows), len(query_ND))
        rates[k] = replace(building, scan_key=scan, query=max(0.0, query - centroids))
    return rates


def _line(seconds: Sequence[float], keys: Sequence[float], queries: int) -> tuple[float, float]:
    """Seconds per query and key, and per query, from two measurements."""
    (short, long), (less, more) = seconds, keys
    per_key = max(0.0, (long - short) / queries / (more - less))
    return per_key, max(0.0, short / queries - per_key * less)


def _exact(keys: Array, rows: int, query_ND: Tensor, k: int) -> tuple[float, float, float]:
    """Seconds per query and key, per query, and per query and key among the nearest so far, of exact search."""
    k, sizes = min(k, rows), (rows // 2, 2 * rows)
    # With few neighbours the products show, with k of them the rest. Fewer would be searched for in another way.
    few = min(k, FEW_PRODUCTS // keys.shape[1] + 1, sizes[0])
    times = [_exact_seconds(keys[:size], query_ND, few) for size in sizes]
    if k < 2 * few:
        return *_line(times, sizes, len(query_ND)), 0.0
    more = (_exact_seconds(keys, query_ND, k) - times[1]) / len(query_ND)
    record = max(0.0, more / (records(k, sizes[1]) - records(few, sizes[1])))
    times = [t - len(query_ND) * record * records(few, size) for t, size in zip(times, sizes)]
    return *_line(times, sizes, len(query_ND)), record


def _exact_seconds(keys: Array, query_ND: Tensor, k: int) -> float:
    index = ExactIndex(keys)
    return min(seconds_of(lambda: index.search(query_ND, k)) for _ in range(4))

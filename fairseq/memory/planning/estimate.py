"""Cost of a datastore and an index over it, before either is built: bytes by formula, seconds by measured rates.

n keys of width d, of ``b`` bytes per number; c lists (``--ncentroids``), m bytes of a compressed key (``--code_size``),
p probed lists (``--probe``), q queries for k neighbours, t training keys. Bytes on disk and in memory:

| what | bytes |
|---|---|
| store | n (b d + 8): keys, and values in 8 bytes |
| ``flat`` | 4 n d |
| ``ivfpq`` | n (m + 8) + 4 c d + 1024 d: codes and row numbers, centroids, 256 codewords |
| ``ivfsq8`` | n (d + 8) + 4 c d + 8 d: a byte per column, its minimum and its range |
| ``ivfpq-fastscan`` | n (m + 8) + 16 m c + 4 c d + 64 d: 4-bit codes by 32 keys, each list rounded up |
| ``ivfrabitq`` | n (d / 8 + 16) + 4 c d + 4 d^2 + 4 d: a bit per column and two numbers, a rotation, a centre |

During a build the codes are on disk twice. Building holds the index and 4 t d bytes of training keys in memory;
searching holds the whole index. Exact search holds ``--search-memory`` and reads the keys once per bulk of queries.

Seconds: comparing a key or a query with c centroids takes c d / A (A: products per second of faiss's flat search).
Training is 10 passes of k-means over t keys, 10 t c d / A, and the compression's own u + v min(t, 65536). Adding is n
(c d / A + e). A query of an index takes c d / A + s p n / c + r. Exact search takes q (x n + y + z k (1 + log(n / k))),
or the time of reading if that is longer: z is for a key that is among the k nearest of those before it, of which keys
in random order have k (1 + log(n / k)). u, v, e, s, r, x, y, z are measured on a small random store (``measure.py``).
Reading and writing files is added to building and searching an index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.memory.datastore.layout import KEY_DTYPES
from fairseq.memory.planning.config import PlanConfig

KMEANS_PASSES = 10
_MAX_CODE_TRAINING = 65_536
_KEYS_PER_LIST = 256  # faiss's k-means samples at most this many


@dataclass(frozen=True)
class IndexSize:
    """Bytes of an index without its keys, and per key."""

    fixed: float
    per_key: float

    def of(self, keys: int) -> int:
        """Bytes with this number of keys."""
        return round(self.fixed + keys * self.per_key)


def _ivf(config: PlanConfig, codes: float, fixed: float) -> IndexSize:
    return IndexSize(4 * config.ncentroids * config.dim + fixed, codes + 8)


SIZES: Mapping[str, Callable[[PlanConfig], IndexSize]] = {
    "flat": lambda c: IndexSize(0, 4 * c.dim),
    "ivfpq": lambda c: _ivf(c, c.code_size, 1024 * c.dim),
    "ivfsq8": lambda c: _ivf(c, c.dim, 8 * c.dim),
    "ivfpq-fastscan": lambda c: _ivf(c, c.code_size, 64 * c.dim + 16 * c.code_size * c.ncentroids),
    "ivfrabitq": lambda c: _ivf(c, math.ceil(c.dim / 8) + 8, 4 * c.dim**2 + 4 * c.dim),
}
"""The formulas above, by the kind's name for ``build_dstore.py --index``."""


@dataclass(frozen=True)
class IndexRates:
    """Measured seconds of one kind of index."""

    train: float
    """Training of the compression, independent of the number of keys."""
    train_key: float
    """Training of the compression, per training key."""
    add_key: float
    """Compressing and adding a key, without assigning it to a list."""
    scan_key: float
    """Search, per query and key of a probed list."""
    query: float
    """Search, per query, independent of the probed lists."""


@dataclass(frozen=True)
class Rates:
    """Rates measured on this machine."""

    read_bytes: float
    """Bytes read from disk per second."""
    write_bytes: float
    """Bytes written to disk per second."""
    matmul: float
    """Multiplications and additions of a large float32 product, per second."""
    assign: float
    """Products of a key's number with a centroid's, per second (A)."""
    exact_key: float
    """Exact search, per query and key."""
    exact_query: float
    """Exact search, per query."""
    indexes: Mapping[str, IndexRates]
    """Rates by kind, for the kinds that this release builds."""
    exact_record: float = 0.0
    """Exact search, per query and key that is among the nearest so far; see ``records``."""


@dataclass(frozen=True)
class Choice:
    """Cost of one kind of index, in bytes and seconds."""

    kind: str
    disk: int
    """The index on disk, without the store."""
    disk_building: int
    """Peak bytes on disk during the build."""
    memory_building: int
    memory: int
    """Memory during search."""
    gpu_memory: int
    """GPU memory of a search: the index, or for exact search the keys in 16 bits."""
    build_seconds: float | None
    """None if the kind cannot be measured."""
    search_seconds: float | None
    """Time of all queries."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return dict(vars(self))


@dataclass(frozen=True)
class Plan:
    """The store, and every way to search it."""

    store_bytes: int
    write_seconds: float
    """Time to write the store, without the model's own time."""
    choices: tuple[Choice, ...]


def plan(config: PlanConfig, rates: Rates, memory_bytes: int) -> Plan:
    """Estimate the store of a config, and every way to search it.

    Args:
        memory_bytes: RAM of the machine; keys that fit are read from disk once.
    """
    store = config.keys * (config.dim * KEY_DTYPES[config.dtype].itemsize + 8)
    choices = [_exact(config, rates, store, memory_bytes)]
    choices += [_index(config, rates, kind, store) for kind in SIZES]
    return Plan(store, store / rates.write_bytes, tuple(choices))


def _exact(config: PlanConfig, rates: Rates, store: int, memory_bytes: int) -> Choice:
    from fairseq.memory.index.candidates.room import CANDIDATE_BYTES, capacity

    memory = round(config.search_memory * 1e9)
    bulk = max(1, memory // (CANDIDATE_BYTES * capacity(config.k) + 12 * config.dim))
    passes = math.ceil(config.queries / bulk) if store > memory_bytes / 2 else 1
    reading = passes * store / rates.read_bytes
    per_query = rates.exact_key * config.keys + rates.exact_query
    computing = config.queries * (per_query + rates.exact_record * records(config.k, config.keys))
    return Choice("exact", 0, 0, 0, memory, 2 * config.keys * config.dim, 0.0, max(reading, computing))


def records(k: int, keys: int) -> float:
    """Keys in random order that are among the k nearest of themselves and those before them: nearly the expectation."""
    return k * (1 + math.log(max(1.0, keys / k)))


def training_keys(config: PlanConfig, kind: str) -> int:
    """Number of training keys of a kind of index."""
    if kind == "flat":
        return 0
    return min(config.keys, config.train_size, max(_KEYS_PER_LIST * config.ncentroids, _MAX_CODE_TRAINING))


def _index(config: PlanConfig, rates: Rates, kind: str, store: int) -> Choice:
    size, num_training = SIZES[kind](config), training_keys(config, kind)
    disk = size.of(config.keys)
    building = round(2 * config.keys * size.per_key + size.fixed)
    memory_building = disk + 4 * num_training * config.dim
    rate = rates.indexes.get(kind)
    seconds: tuple[float | None, float | None] = (None, None)
    if rate is not None:
        lists = 0 if kind == "flat" else config.ncentroids
        centroids = lists * config.dim / rates.assign
        training = rate.train + min(num_training, _MAX_CODE_TRAINING) * rate.train_key
        training += KMEANS_PASSES * num_training * centroids
        adding = config.keys * (centroids + rate.add_key)
        # The keys are read once; the codes are written twice and read once.
        file_seconds = store / rates.read_bytes + 2 * disk / rates.write_bytes + disk / rates.read_bytes
        scanned_keys = config.keys * (min(1.0, config.probe / lists) if lists else 1.0)
        per_query = centroids + rate.scan_key * scanned_keys + rate.query
        seconds = (training + adding + file_seconds, config.queries * per_query + disk / rates.read_bytes)
    return Choice(kind, disk, building, memory_building, disk, disk, *seconds)

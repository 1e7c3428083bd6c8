"""Builds an index over a datastore in three steps, each of which survives a kill: train, encode, assemble.

Training learns from a random sample. Encoding turns every key into a few bytes that are appended to a file, so that a
checkpoint costs nothing and rows can neither be lost nor added twice. Assembling puts the codes into the index.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.disk import naming
from fairseq.memory.datastore import Datastore
from fairseq.memory.files import Array, locked, may_create_in, read_json, write_json
from fairseq.memory.index.build_config import BuildConfig
from fairseq.memory.index.faiss_builder import FaissBuilder
from fairseq.memory.types import Metric

logger = logging.getLogger(__name__)

# Keys are encoded in blocks that start at multiples of this, whatever the checkpoints: a matrix product may round
# differently in blocks of another size, and a key between two lists would then land in the other one.
_BLOCK_ROWS = 16_384
_MIN_PQ_ROWS = 256  # a code byte tells 256 patterns apart


@dataclasses.dataclass(frozen=True)
class BuiltIndex:
    """What was built."""

    path: Path
    rows: int
    bytes: int
    train_seconds: float
    add_seconds: float


@dataclasses.dataclass(frozen=True)
class _Files:
    """The names a build uses; all but the first two are gone when it has ended."""

    index: Path
    about: Path
    trained: Path
    codes: Path
    progress: Path
    lock: Path

    @classmethod
    def of(cls, config: BuildConfig) -> _Files:
        name = f"{config.faiss_index}.{config.dist}"
        return cls(*(Path(name + end) for end in ("", ".json", ".trained", ".codes.tmp", ".progress.json", ".lock")))


def open_store(config: BuildConfig) -> Datastore:
    """Open the datastore. Raises: ValueError when it is missing or of another size than stated."""
    store = Datastore.open_any(
        config.dstore_mmap,
        dim=config.dimension,
        size=config.dstore_size,
        fp16=config.dstore_fp16,
        bf16=config.dstore_bf16,
    )
    if config.dimension is not None and config.dimension != store.dim:
        raise ValueError(
            f"datastore {store.prefix!r} has keys of width {store.dim}; --dimension says {config.dimension}: "
            "leave it out"
        )
    return store.require(size=config.dstore_size)


def check(config: BuildConfig, store: Datastore) -> None:
    """Raise ValueError or OSError for what cannot work, before anything is computed."""
    rows, dim = len(store), store.dim
    if config.index == "ivfpq":
        if dim % config.code_size:
            divisors = [d for d in range(1, dim + 1) if dim % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - config.code_size))
            raise ValueError(f"--code_size {config.code_size} does not divide the width {dim}; give {nearest}, say")
        if config.ncentroids > rows:
            raise ValueError(
                f"--ncentroids {config.ncentroids} is more than the datastore's {rows} rows; give about "
                f"{max(1, rows // 100)}"
            )
        if rows < _MIN_PQ_ROWS:
            raise ValueError(
                f"the datastore has {rows} rows, compression learns from at least {_MIN_PQ_ROWS}; use --index flat"
            )
    if config.ncentroids > config.train_size:
        raise ValueError(f"--train_size {config.train_size} is less than --ncentroids {config.ncentroids}; raise it")
    folder = Path(f"{config.faiss_index}.{config.dist}").parent
    may_create_in(folder)
    needed, free = 2 * rows * (_code_bytes(config, dim) + 8), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"building needs about {needed} bytes, {str(folder.resolve())!r} has {free} free; free some or choose "
            "another disk"
        )


def _code_bytes(config: BuildConfig, dim: int) -> int:
    return 4 * dim if config.index == "flat" else config.code_size


def build_index(config: BuildConfig) -> BuiltIndex:
    """Build the index a config describes, going on where an interrupted build of the same stood.

    Raises: ValueError or OSError when something cannot work, before any long work.
    """
    store = open_store(config)
    check(config, store)
    files = _Files.of(config)
    signature = _signature(config, store)
    with locked(files.lock, f"index {str(files.index)!r}"):
        if _complete(files, signature):
            logger.info("%s is complete already; remove it to build it anew", files.index)
            _remove_unfinished(files)
            return BuiltIndex(files.index, len(store), files.index.stat().st_size, 0.0, 0.0)
        done = _rows_done(files, signature)
        if config.starting_point > done:
            raise ValueError(
                f"--starting_point {config.starting_point} would leave out rows {done} to {config.starting_point - 1}: "
                f"{done} rows are encoded so far. An interrupted build goes on by itself; leave the flag at 0"
            )
        started = time.perf_counter()
        builder = _trained(config, store, files, signature)
        trained = time.perf_counter()
        _encode(config, store, files, signature, builder, done)
        _assemble(config, store, files, signature, builder)
    size = files.index.stat().st_size
    return BuiltIndex(files.index, len(store), size, trained - started, time.perf_counter() - trained)


def _signature(config: BuildConfig, store: Datastore) -> dict[str, Any]:
    """What decides the content of the index: builds of equal signature go on from one another."""
    about = {"factory": config.factory, "metric": config.dist, "seed": config.seed, "train_size": config.train_size}
    kept = {"rows": len(store), "dim": store.dim, "key_dtype": store.keys.dtype, "digest": store.digest}
    if kept["digest"] is None:
        kept["modified"] = [os.stat(path).st_mtime for path in store.keys.files]
    return about | {"store": kept}


def _complete(files: _Files, signature: Mapping[str, Any]) -> bool:
    return files.index.exists() and files.about.exists() and read_json(files.about).get("signature") == signature


def _rows_done(files: _Files, signature: Mapping[str, Any]) -> int:
    """Rows an interrupted build of the same index has encoded; leftovers of another are thrown away."""
    if not files.progress.exists():
        return 0
    state = read_json(files.progress)
    if state["signature"] != signature:
        logger.warning("%s: another command left an unfinished build; it is thrown away", files.index)
        _remove_unfinished(files)
        return 0
    if not files.trained.exists() or not files.codes.exists():
        return 0
    if files.codes.stat().st_size < state["rows_done"] * state["code_bytes"]:
        logger.warning("%s is shorter than its progress file says; encoding anew", files.codes)
        return 0
    return int(state["rows_done"])


def _remove_unfinished(files: _Files) -> None:
    for path in (files.trained, files.codes, files.progress):
        path.unlink(missing_ok=True)


def _trained(config: BuildConfig, store: Datastore, files: _Files, signature: Mapping[str, Any]) -> FaissBuilder:
    """The trained, empty index: the one on disk, or a new one that is put there."""
    if files.trained.exists() and files.progress.exists():
        return FaissBuilder.load(files.trained, config.dist == "cos")
    builder = FaissBuilder.new(config.factory, store.dim, Metric.parse(config.dist), config.seed)
    # faiss would draw 256 per list (and 65536 for the compression) from more: reading more is of no use.
    count = min(len(store), config.train_size, max(256 * config.ncentroids, 256 * _MIN_PQ_ROWS))
    sampled = np.random.default_rng(config.seed).choice(len(store), count, replace=False)
    sampled.sort()
    logger.info("training %s on %d of %d keys", config.factory, count, len(store))
    builder.train(store.take_keys(sampled))
    builder.save(files.trained)
    _record(files, signature, builder, 0)
    return builder


def _record(files: _Files, signature: Mapping[str, Any], builder: FaissBuilder, rows_done: int) -> None:
    state = {"signature": signature, "rows_done": rows_done, "code_bytes": builder.code_bytes}
    write_json(files.progress, state)


def _encode(
    config: BuildConfig,
    store: Datastore,
    files: _Files,
    signature: Mapping[str, Any],
    builder: FaissBuilder,
    done: int,
) -> None:
    """Append the codes of all rows from ``done`` on to the codes file."""
    if done:
        logger.info("going on at row %d of %d", done, len(store))
    with naming(files.codes), open(files.codes, "r+b" if done else "wb") as file:
        file.truncate(done * builder.code_bytes)
        file.seek(done * builder.code_bytes)
        recorded = done
        for start in range(done, len(store), _BLOCK_ROWS):
            block: Array = store.keys.block(start, start + _BLOCK_ROWS).float().numpy()
            file.write(builder.encode(block).data)
            done = start + len(block)
            if done - recorded >= config.num_keys_to_add_at_a_time or done == len(store):
                file.flush()
                os.fsync(file.fileno())
                _record(files, signature, builder, done)
                recorded = done
                logger.info("encoded %d of %d keys", done, len(store))


def _assemble(
    config: BuildConfig, store: Datastore, files: _Files, signature: Mapping[str, Any], builder: FaissBuilder
) -> None:
    """Put all codes into the index and give it its name. Raises: ValueError when rows are missing."""
    codes = np.memmap(files.codes, dtype=np.uint8, mode="r").reshape(-1, builder.code_bytes)
    if len(codes) != len(store):
        raise ValueError(f"{files.codes} holds {len(codes)} rows, the datastore {len(store)}; remove it and build anew")
    for start in range(0, len(codes), 1 << 20):
        builder.add_codes(np.array(codes[start : start + (1 << 20)]))
    if builder.num_rows != len(store):
        raise ValueError(f"{files.index} holds {builder.num_rows} rows, the datastore {len(store)}; build it anew")
    builder.set_probe(config.probe)
    files.about.unlink(missing_ok=True)  # what it says of an older index ends with that index
    builder.save(files.index)
    write_json(files.about, {"rows": len(store), "dim": store.dim, "metric": config.dist, "signature": signature})
    _remove_unfinished(files)

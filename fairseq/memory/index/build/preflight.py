"""Checks before a build: everything that can be wrong is reported before any key is read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fairseq.memory.datastore.chunked_array import nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.describe import StoreHints
from fairseq.memory.datastore.reading.read_ahead import iter_blocks
from fairseq.memory.index import INDEXES
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.faiss.builder import FaissBuilder
from fairseq.memory.types import Array, Metric
from fairseq.runtime.files import may_create_in

logger = logging.getLogger(__name__)

# Keys are encoded in blocks that start at multiples of this, whatever the checkpoints and parts: a matrix product may
# round differently in blocks of another size, and a key between two lists would then land in the other one.
BLOCK_ROWS = 16_384
MIN_PQ_ROWS = 256  # a code byte distinguishes 256 patterns


def open_store(config: BuildConfig) -> Datastore:
    """Open the datastore. Raises: ValueError when it is missing or of another size than stated."""
    hints = StoreHints(config.dimension, config.dstore_size, config.dstore_fp16, config.dstore_bf16)
    store = Datastore.open(config.dstore_mmap, hints)
    if config.dimension is not None and config.dimension != store.dim:
        raise ValueError(
            f"datastore {store.prefix!r} has keys of width {store.dim}; --dimension says {config.dimension}: drop it"
        )
    return store.require(size=config.dstore_size)


class StoreShape(Protocol):
    """A datastore, or the plan of one."""

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int:
        """Width of the keys."""
        ...


def check_build(config: BuildConfig, store: StoreShape) -> None:
    """Raise ValueError or OSError for what cannot work, before anything is computed."""
    rows, dim = len(store), store.dim
    per_code = {"ivfpq": 1, "ivfpq-fastscan": 2}.get(config.index)
    if per_code and dim % (per_code * config.code_size):
        divisors = [d for d in range(1, dim + 1) if dim % (per_code * d) == 0]
        if not divisors:
            raise ValueError(f"the width {dim} is odd, {config.index} takes columns in pairs; use --index ivfpq")
        nearest = min(divisors, key=lambda d: abs(d - config.code_size))
        raise ValueError(f"--code_size {config.code_size} does not divide the width {dim}; give {nearest}, say")
    builder = new_builder(config, dim)
    if builder.num_lists > rows:
        name = f"--ncentroids {config.ncentroids}" if config.index in INDEXES else f"--index {config.index}: IVF"
        raise ValueError(f"{name} is more than the datastore's {rows} rows; give about {max(1, rows // 100)}")
    if builder.learns and "PQ" in config.factory(dim) and rows < MIN_PQ_ROWS:
        raise ValueError(
            f"the datastore has {rows} rows, compression learns from at least {MIN_PQ_ROWS}; use --index flat"
        )
    if builder.num_lists > config.train_size:
        raise ValueError(f"--train_size {config.train_size} is less than --ncentroids {builder.num_lists}; raise it")
    for flag, given in (("--num_shards", config.num_shards > 1), ("--on_disk", config.on_disk)):
        if given and not builder.by_codes:
            raise ValueError(
                f"--index {config.index} cannot be built from parts, as {flag} requires; drop {flag} or use "
                "--index ivfpq"
            )
    if config.on_disk and (not builder.has_lists or "fs" in config.factory(dim)):
        raise ValueError(f"--index {config.index} has no lists that --on_disk can keep; drop it or use --index ivfpq")
    if config.num_shards > -(-rows // BLOCK_ROWS):
        raise ValueError(
            f"--num_shards {config.num_shards} is too many for {rows} rows; give at most {-(-rows // BLOCK_ROWS)}"
        )
    folder = Path(f"{config.faiss_index}.{config.dist}").parent
    may_create_in(folder)
    needed, free = (3 if config.on_disk else 2) * rows * builder.row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"building needs about {needed} bytes, {str(folder.resolve())!r} has {free} free; free some or choose "
            "another disk"
        )


def new_builder(config: BuildConfig, dim: int) -> FaissBuilder:
    """A builder of the kind a config names, for keys of this width."""
    return FaissBuilder.new(config.factory(dim), dim, Metric.parse(config.dist), config.seed, build_device(config))


def build_device(config: BuildConfig) -> str:
    """Device that training and encoding run on."""
    return "cuda" if torch.cuda.is_available() and not config.use_faiss_cpu else "cpu"


def warn_of_few_rows(config: BuildConfig, builder: FaissBuilder, num_rows: int) -> None:
    """Log one line where lists or codes are learned from fewer rows than make good ones."""
    wanted, lists = builder.rows_to_learn_well, builder.num_lists
    if num_rows >= wanted:
        return
    ways = [f"raise --train_size {config.train_size}"] if config.train_size < wanted else []
    fewer = max(1, num_rows // 39)
    if lists > fewer:
        ways.append(f"give --ncentroids {fewer}" if config.index in INDEXES else f"name IVF{fewer} in --index")
    ways.append("use --index flat, which learns nothing")
    logger.warning(
        "%d training rows are few for %d lists of %s: %d or more make good ones; %s",
        num_rows, lists, config.factory(builder.inner.d), wanted, ", or ".join(ways),
    )  # fmt: skip


def dropped_rows(config: BuildConfig, store: Datastore) -> Array:
    """Rows whose keys are not finite. Raises: ValueError when there are any and they are not to be dropped."""
    none = np.empty(0, np.int64)
    if store.shards and not config.drop_nonfinite:
        return none  # our writer lets none in; encoding looks again
    nonfinite_rows = [nonfinite(block_ND).numpy() + start for start, block_ND in iter_blocks(store.keys, BLOCK_ROWS)]
    rows = np.concatenate(nonfinite_rows) if nonfinite_rows else none
    if len(rows) and not config.drop_nonfinite:
        raise nonfinite_error(store, len(rows), int(rows[0]))
    if len(rows):
        logger.warning("%d keys hold NaN or infinity and are dropped", len(rows))
    if len(rows) == len(store):
        raise ValueError(f"all {len(rows)} keys of datastore {store.prefix!r} hold NaN or infinity; save it again")
    return rows


def nonfinite_error(store: Datastore, count: int, first: int) -> ValueError:
    """The error for keys that hold NaN or infinity."""
    return ValueError(
        f"{count} keys of datastore {store.prefix!r} hold NaN or infinity, the first in row {first}; --drop_nonfinite "
        "drops them, fairseq-datastore convert --drop-nonfinite writes a store without them"
    )

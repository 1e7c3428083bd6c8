"""Builds an index over a datastore in three steps, each of which survives a kill: train, encode, assemble.

Training learns from a random sample. Encoding turns every key into a few bytes that are appended to a file, so that a
checkpoint costs nothing and rows can neither be lost nor added twice; parts of the rows can be encoded by different
commands. Assembling puts the codes into the index. Kinds that have no codes (graphs) are filled directly, and kept
whole from time to time.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.reading.read_ahead import iter_blocks
from fairseq.memory.index.build import preflight
from fairseq.memory.index.build.config import BuildConfig
from fairseq.memory.index.build.files import (
    BuildFiles,
    is_complete,
    is_trained,
    record,
    remove_leftovers_of_another,
    require_one_build,
    rows_done,
    seconds_spent,
    signature_of,
)
from fairseq.memory.index.faiss.builder import FaissBuilder
from fairseq.memory.index.faiss.index import index_metadata
from fairseq.memory.index.faiss.on_disk_lists import assemble_on_disk
from fairseq.memory.index.kmeans.kmeans import sample_size
from fairseq.memory.types import Array, Metric
from fairseq.runtime.atomic_files import naming
from fairseq.runtime.file_marks import file_mark
from fairseq.runtime.files import locked, write_json
from fairseq.runtime.records import seal

logger = logging.getLogger(__name__)

_SAVING_SHARE = 0.05  # of the time of filling a graph, at most
_SECONDS_TO_TRAIN = 7 * 86400.0  # another part's command may be at it
_SECONDS_TO_JOIN = 3600.0


@dataclasses.dataclass(frozen=True)
class BuiltIndex:
    """A finished index, or the part that one command encoded."""

    path: Path
    rows: int
    bytes: int
    train_seconds: float
    add_seconds: float
    missing: tuple[int, ...] = ()
    """Parts that other commands have still to encode: without them there is no index yet."""


def build_index(config: BuildConfig) -> BuiltIndex:
    """Build the index that a config describes, or one shard of it; resume an interrupted build of the same index.

    Args:
        config: which store, which kind of index, and where to.
    Returns: path, rows, bytes, seconds, and the shards that other commands have still to encode (``missing``).
    Raises: ValueError or OSError when something cannot work, before any long work.

    ```python
    built = build_index(config)
    assert built.rows == 1000 and not built.missing
    ```
    """
    store = preflight.open_store(config)
    preflight.check_build(config, store)
    files = BuildFiles.of(config)
    signature = signature_of(config, store)
    with locked(files.lock, f"index {str(files.index)!r}"):
        if is_complete(files, signature):
            logger.info("%s is complete already; remove it to build it again", files.index)
            _clean(config)
            return _built(files, store)
        job = _Build(config, store, files, signature, preflight.dropped_rows(config, store))
        if not config.merge:
            job.check_starting_point()
            job.train()
            if job.copies:
                pass  # a copy is sooner made again than kept twice
            elif job.builder.by_codes:
                job.encode()
            else:
                job.fill()
        # Before another command of this part may begin, which would take what assembling removes for its own start.
        with locked(files.joining_lock, f"index {str(files.index)!r}", _SECONDS_TO_JOIN):
            if is_complete(files, signature):  # by the command of another part
                _clean(config)
                return _built(files, store)
            missing = job.missing_parts()
            if missing and config.merge:
                raise ValueError(
                    f"{files.index} lacks the parts {', '.join(map(str, missing))} of {config.num_shards}; run the "
                    "same command with the --shard_id of each"
                )
            if missing:
                size = files.codes.stat().st_size
                return BuiltIndex(files.codes, len(job.rows), size, job.trained, job.added, missing)
            job.assemble()
            return _built(files, store)


def _built(files: BuildFiles, store: Datastore) -> BuiltIndex:
    metadata = index_metadata(files.index)
    size = sum(mark["bytes"] for mark in metadata.get("files", {}).values()) or files.index.stat().st_size
    trained, added = (float(metadata.get(name, 0.0)) for name in ("train_seconds", "add_seconds"))
    return BuiltIndex(files.index, len(store), size, trained, added)


def _clean(config: BuildConfig) -> None:
    """Remove what a complete index needs no more."""
    for shard in range(config.num_shards):
        BuildFiles.of(config, shard).remove_unfinished()
    BuildFiles.of(config).remove_trained()


class _Build:
    """One command's share of a build."""

    builder: FaissBuilder

    def __init__(
        self, config: BuildConfig, store: Datastore, files: BuildFiles, signature: Mapping[str, Any], dropped: Array
    ) -> None:
        self.config, self.store, self.files, self.signature, self.dropped = config, store, files, signature, dropped
        self.rows = self._rows_of(config.shard_id)
        if config.num_shards > 1:
            require_one_build(files, signature)
        remove_leftovers_of_another(files, signature)
        self.done = rows_done(files, signature)
        self.trained, self.added = seconds_spent(files.trained_metadata), seconds_spent(files.progress)

    def _rows_of(self, shard: int) -> range:
        """Rows of a part: whole blocks, so that every code is what a build in one piece makes."""
        blocks = -(-len(self.store) // preflight.BLOCK_ROWS)
        first, past = (blocks * at // self.config.num_shards * preflight.BLOCK_ROWS for at in (shard, shard + 1))
        return range(first, min(past, len(self.store)))

    @property
    def copies(self) -> bool:
        """True if the keys go into the index as they are."""
        return self.config.num_shards == 1 and self.builder.copies

    def check_starting_point(self) -> None:
        """Raise ValueError when rows would be skipped."""
        if self.config.starting_point > self.rows.start + self.done:
            raise ValueError(
                f"--starting_point {self.config.starting_point} would skip rows {self.rows.start + self.done} to "
                f"{self.config.starting_point - 1}: {self.done} rows are encoded so far. An interrupted build resumes "
                "by itself; leave the flag at 0"
            )

    def train(self) -> None:
        """Make the trained, empty index, or take the one that is there."""
        started = time.perf_counter()
        with locked(self.files.trained.with_name(self.files.trained.name + ".lock"), "it", _SECONDS_TO_TRAIN):
            if self._load():
                return
            self.done = 0
            self.builder = preflight.new_builder(self.config, self.store.dim)
            if self.builder.learns:
                sample = training_rows(self.config, self.store, self.builder.num_lists)
                sample = sample[~np.isin(sample, self.dropped)]
                logger.info(
                    "training %s on %d of %d keys", self.config.factory(self.store.dim), len(sample), len(self.store)
                )
                preflight.warn_of_few_rows(self.config, self.builder, len(sample))
                keys_ND = self.store.take_keys(sample)
                bad = nonfinite(torch.from_numpy(keys_ND))
                if len(bad):
                    raise preflight.nonfinite_error(self.store, len(bad), int(sample[bad[0]]))
                self.builder.train(keys_ND)
            self.builder.save(self.files.trained)
            self.trained = time.perf_counter() - started
            write_json(self.files.trained_metadata, {"signature": self.signature, "seconds": self.trained})

    def _load(self) -> bool:
        """Read the trained index, if it is there."""
        if not is_trained(self.files, self.signature):
            return False
        words = (self.config.factory(self.store.dim), Metric.parse(self.config.dist), self.config.seed)
        try:
            self.builder = FaissBuilder.load(self.files.trained, *words, preflight.build_device(self.config))
        except ValueError as error:
            logger.warning("%s; training again", error)
            return False
        self.trained = seconds_spent(self.files.trained_metadata)
        return True

    def _blocks(self, start: int) -> Iterator[tuple[int, Array]]:
        """The keys from a row of this part on in blocks: number of the first row, and the block as float32."""
        for first, block_ND in iter_blocks(self.store.keys, preflight.BLOCK_ROWS, start, self.rows.stop):
            yield first, self._checked(first, block_ND.float())

    def _checked(self, start: int, block_ND: Tensor) -> Array:
        """A block of finite keys; zeros where keys are dropped."""
        low, high = np.searchsorted(self.dropped, (start, start + len(block_ND)))
        if high > low:
            block_ND = block_ND.clone()
            block_ND[torch.from_numpy(self.dropped[low:high] - start)] = 0.0
        bad = nonfinite(block_ND)
        if len(bad):
            raise preflight.nonfinite_error(self.store, len(bad), start + int(bad[0]))
        array: Array = block_ND.numpy()
        return array

    def encode(self) -> None:
        """Append the codes of all rows that are not done to the codes file."""
        code_bytes, began = self.builder.code_bytes, time.perf_counter() - self.added
        if self.done:
            logger.info("resuming at row %d of %d", self.done, len(self.rows))
        with naming(self.files.codes), open(self.files.codes, "r+b" if self.done else "wb") as file:
            file.truncate(self.done * code_bytes)
            file.seek(self.done * code_bytes)
            recorded = self.done
            for start, block in self._blocks(self.rows.start + self.done):
                file.write(self.builder.encode(block).data)
                done = start + len(block) - self.rows.start
                if done - recorded >= self.config.num_keys_to_add_at_a_time or done == len(self.rows):
                    file.flush()
                    os.fsync(file.fileno())
                    self.added = time.perf_counter() - began
                    self._record(done, code_bytes)
                    recorded = done
                    logger.info("encoded %d of %d keys", done, len(self.rows))

    def _record(self, done: int, code_bytes: int) -> None:
        record(self.files, self.signature, rows_done=done, code_bytes=code_bytes, seconds=self.added)

    def fill(self) -> None:
        """Add the rows to an index that has no codes, and keep it whole now and then."""
        began = time.perf_counter() - self.added
        if self.done:
            words = (self.config.factory(self.store.dim), Metric.parse(self.config.dist), self.config.seed)
            try:
                self.builder = FaissBuilder.load(self.files.codes, *words)
            except ValueError as error:
                logger.warning("%s; adding all rows again", error)
            logger.info("resuming at row %d of %d", self.builder.num_rows, len(self.rows))
        self.done = self.builder.num_rows  # of what was saved before it was recorded nothing is lost
        recorded, saved_at, saving = self.done, time.perf_counter(), 0.0
        for start, block in self._blocks(self.done):
            self.builder.add(block, self.config.graph_threads)
            done, now = start + len(block), time.perf_counter()
            due = done - recorded >= self.config.num_keys_to_add_at_a_time and saving <= _SAVING_SHARE * (
                now - saved_at
            )
            if due or done == len(self.rows):
                self.builder.save(self.files.codes)
                saved_at = time.perf_counter()
                saving, self.added, recorded = saved_at - now, saved_at - began, done
                self._record(done, 0)
                logger.info("added %d of %d keys", done, len(self.rows))

    def missing_parts(self) -> tuple[int, ...]:
        """Parts whose rows are not all encoded."""
        missing: list[int] = []
        if self.config.num_shards == 1:
            return ()
        for shard in range(self.config.num_shards):
            if rows_done(BuildFiles.of(self.config, shard), self.signature) < len(self._rows_of(shard)):
                missing.append(shard)
        return tuple(missing)

    def assemble(self) -> None:
        """Put all codes into the index and give it its name. Raises: ValueError when rows are missing."""
        began = time.perf_counter()
        if not hasattr(self, "builder") and not self._load():
            raise ValueError(f"{self.files.trained} is missing or of another build; copy it beside the parts")
        self.files.metadata.unlink(missing_ok=True)  # what it says of an older index ends with that index
        endings = ["", ".ivfdata"] if self.config.on_disk else [""]
        parts = [BuildFiles.of(self.config, shard) for shard in range(self.config.num_shards)]
        if self.copies:
            for _, block in self._blocks(0):
                self.builder.add(block)
        elif self.builder.by_codes:
            codes = [self._codes(part.codes) for part in parts]
            self.builder.set_probe(self.config.probe)
            if self.config.on_disk:
                assemble_on_disk(self.builder, codes, self.files.index, self.files.lists)
            else:
                for part in codes:
                    for start in range(0, len(part), 1 << 20):
                        self.builder.add_codes(np.array(part[start : start + (1 << 20)]))
        if self.builder.num_rows != len(self.store):
            raise ValueError(
                f"{self.files.index} holds {self.builder.num_rows} rows, the datastore {len(self.store)}; "
                "build it again"
            )
        if not self.config.on_disk:
            self.builder.set_probe(self.config.probe)
            self.builder.save_finished(self.files.index)
        spent = [seconds_spent(part.progress) for part in parts]
        metadata = {"rows": len(self.store), "dim": self.store.dim, "metric": self.config.dist}
        metadata |= {"files": {end: file_mark(Path(f"{self.files.index}{end}")) for end in endings}}
        metadata |= {"train_seconds": self.trained, "add_seconds": sum(spent) + time.perf_counter() - began}
        if len(self.dropped):
            metadata["left_out"] = self.dropped.tolist()
        write_json(self.files.metadata, seal(metadata | {"signature": self.signature}))
        _clean(self.config)

    def _codes(self, path: Path) -> Array:
        codes: Array = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, self.builder.code_bytes)
        return codes


def rows_seen(config: BuildConfig, store: Datastore) -> Array:
    """Rows the index was trained on, rising; none of a kind that learns nothing."""
    builder = preflight.new_builder(config, store.dim)
    return training_rows(config, store, builder.num_lists) if builder.learns else np.empty(0, np.int64)


def training_rows(config: BuildConfig, store: Datastore, num_lists: int) -> Array:
    """Rows the index is trained on, rising."""
    # faiss would draw 256 per list (and 65536 for the compression) from more: reading more is of no use.
    count = sample_size(len(store), max(num_lists, preflight.MIN_PQ_ROWS), config.train_size)
    sampled: Array = np.random.default_rng(config.seed).choice(len(store), count, replace=False)
    sampled.sort()
    return sampled

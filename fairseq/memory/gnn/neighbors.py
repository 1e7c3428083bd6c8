"""Neighbours of every token of a split among the train positions, searched once and kept on disk.

Shapes: N tokens of the split, K neighbours of each, P chosen tokens, Q tokens of a bulk, M neighbours that were found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.config import shard_suffix
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.documents import Documents
from fairseq.memory.gnn.neighbors_config import NeighborsConfig
from fairseq.memory.gnn.row_file import RowFile, RowWriter, beside, existing, require_ours
from fairseq.memory.index.base import Index
from fairseq.memory.index.sharded.opening import open_search
from fairseq.memory.index.sharded.ranges import SearchSettings
from fairseq.memory.retrieval.file import store_digest
from fairseq.memory.sources.external import by_row_where_equal
from fairseq.memory.types import Metric
from fairseq.runtime.manifest import file_digest

logger = logging.getLogger(__name__)

_SPARE = 32  # neighbours found besides K at first, for those that are too near
_SAMPLED = 1 << 20  # numbers of another program's file that are looked at when it is opened
_SHARED = ("model_digest", "key_tap", "dictionary_digest")
_SHARD_RECORD = r"\.shard\d+of([1-9]\d*)\.json"
_HEADERLESS = re.compile(r"neighbors\.mmap\.(\d+)")


def neighbor_dtype(num_rows: int) -> str:
    """Type of the row numbers that are kept, for a train split of so many rows."""
    return "int32" if num_rows < 1 << 31 else "int64"


@dataclass(frozen=True)
class SplitNeighbors:
    """An opened file of neighbours; its rows stay on disk.

    ```python
    neighbors = SplitNeighbors.open("valid.neighbors", train=store, num_tokens=len(valid_store))
    neighbors.take(torch.arange(256), k=32)  # int64 (256, 32) rows of the train store, -1 where there are fewer
    ```
    """

    path: str
    rows: ChunkedArray
    made_of: Mapping[str, Any]
    """What decided the content; empty for a headerless file."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        train: Datastore,
        num_tokens: int | None = None,
        other_keys: bool = False,
    ) -> SplitNeighbors:
        """Open a file of ours, all shards of one, or the original's headerless ``neighbors.mmap.K``.

        Args:
            train: the datastore that the neighbours are rows of.
            num_tokens: tokens of the split; None compares nothing.
            other_keys: ``train`` may have other keys of the same text than those that were searched.
        Raises: ValueError when it is missing, damaged, of another store, or of other sizes.
        """
        path = os.fspath(path)
        rows, made_of = _headerless(path) if _HEADERLESS.fullmatch(os.path.basename(path)) else _ours(path)
        digest = store_digest(train)
        if made_of.get("store", digest) != digest and not other_keys:
            raise ValueError(
                f"{path} holds neighbours in another datastore ({str(made_of['store'])[:16]}) than {train.prefix!r} "
                f"({digest[:16]}); name that one, or search again with fairseq-neighbors"
            )
        if num_tokens is not None and len(rows) != num_tokens:
            raise ValueError(
                f"{path} holds neighbours of {len(rows)} tokens, the split has {num_tokens}; search again with "
                "fairseq-neighbors"
            )
        _require_rows(path, rows, len(train))
        return cls(path, rows, made_of)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def k(self) -> int:
        """Neighbours kept for each token."""
        return self.rows.shape[1]

    @property
    def digest(self) -> str:
        """Identity of what decided the content; of a headerless file its size and its last change."""
        if not self.made_of:
            facts = os.stat(self.path)
            return f"{self.path} {facts.st_size} {facts.st_mtime_ns}"
        return hashlib.sha256(json.dumps(self.made_of, sort_keys=True).encode()).hexdigest()

    def require_split(self, queries: Datastore) -> None:
        """Raise ValueError unless the neighbours are those of this store's rows, where that is recorded."""
        saved, digest = self.made_of.get("queries"), store_digest(queries)
        if saved not in (None, digest):
            raise ValueError(
                f"{self.path} holds neighbours of another store ({str(saved)[:16]}) than {queries.prefix!r} "
                f"({digest[:16]}), which may have been saved again; remove it, or search again with fairseq-neighbors"
            )

    @property
    def search(self) -> dict[str, Any]:
        """What decided the content, the same for one file and for its shards; empty for a headerless file."""
        return {name: value for name, value in self.made_of.items() if name not in ("kind", "tokens")}

    @property
    def searched_band(self) -> int:
        """Distance in tokens from which on the search saw all neighbours that it could take; 0 where nothing replaces
        the nearer ones, or none is recorded. Which neighbours are kept says nothing of the keys nearer than this."""
        return int(self.made_of.get("band", 0)) if self.made_of.get("replaced", False) else 0

    def require(self, k: int) -> None:
        """Raise ValueError unless so many neighbours are kept."""
        if k > self.k:
            raise ValueError(
                f"{k} neighbours are asked for and {self.path} keeps {self.k} of each token; give at most {self.k}, or "
                f"search again with fairseq-neighbors --k {k}"
            )

    def take(self, token_P: Tensor, k: int) -> Tensor:
        """Neighbours of some tokens, best first, int64 (P, k); -1 where there are fewer."""
        return self.rows.take(token_P)[:, :k].long()


def search_split(config: NeighborsConfig, report: Callable[[int, int], object] = lambda done, total: None) -> RowFile:
    """Search for every token of a split, or resume; returns the file of this command's shard. Complete ones are kept.

    Args:
        report: is given the tokens done and those there are, after each bulk.
    Raises: ValueError or OSError when a store, an index or the file does not fit, before any search.
    """
    path = config.shard_path
    if os.path.isdir(config.path):
        raise ValueError(f"--out {config.path} is a folder; name a file in it")
    require_ours(path)
    train, queries = Datastore.open(str(config.dstore_filename)), Datastore.open(config.queries)
    _require_alike(train, queries)
    k, is_train = config.num_neighbors, store_digest(train) == store_digest(queries)
    first, end = (len(queries) * (config.shard_id + at) // config.num_shards for at in (0, 1))
    settings = SearchSettings(
        Metric.parse(config.faiss_metric_type), probe=config.probe, memory_bytes=int(config.search_memory * 1e9)
    )
    index = open_search(
        train, settings, config.indexfile, search_on=config.search_on, search_workers=config.search_workers
    )
    if is_train:
        _warn_of_leaks(config, train)
    made_of = _made_of(config, train, queries, index, is_train=is_train) | {"tokens": [first, end]}
    there = existing(path, made_of)
    if there is not None:
        if there.rows.shape[1] != k:
            raise ValueError(
                f"{path} is complete with {there.rows.shape[1]} neighbours of each token, this command asks for {k}; "
                "give another --out, or remove it"
            )
        return there
    search = _BandedSearch(index, train, config) if is_train else None
    with RowWriter(path, end - first, k, neighbor_dtype(len(train)), made_of) as writer:
        if writer.rows_done:
            logger.info("resuming at token %d of %d", writer.rows_done, end - first)
        while writer.rows_done < end - first:
            start = first + writer.rows_done
            stop = min(start + config.bulk, end)
            query_QD = queries.keys.block(start, stop).float()
            if search is None:
                found_QK = _widened(_found(index, query_QD, min(k, len(train))), k)
            else:
                found_QK = search(query_QD, torch.arange(start, stop))
            writer.append(found_QK)
            writer.checkpoint_when_due()
            report(writer.rows_done, end - first)
        return writer.finish()


class _BandedSearch:
    """Neighbours of train tokens outside of their own surroundings."""

    def __init__(self, index: Index, train: Datastore, config: NeighborsConfig) -> None:
        self.index, self.config, self.num_rows = index, config, len(train)
        if config.exclude_own_document and not train.has_documents:
            raise ValueError(
                f"--exclude-own-document: datastore {train.prefix!r} does not say of which document its rows are; drop "
                "the flag"
            )
        self.documents: Documents | None = train.documents if config.exclude_own_document else None

    def __call__(self, query_QD: Tensor, position_Q: Tensor) -> Tensor:
        """The K nearest that may be taken, (Q, K); -1 where there are fewer."""
        k = self.config.num_neighbors
        wanted = k if self.config.no_replacement else k + _SPARE
        if self.config.no_replacement:
            found_QM = _found(self.index, query_QD, min(wanted, self.num_rows))
            return _widened(found_QM.masked_fill(~self._may_be(found_QM, position_Q), -1), k)
        result_QK = torch.full((len(query_QD), k), -1)
        open_Q = torch.arange(len(query_QD))
        while len(open_Q):
            count = min(wanted, self.num_rows)
            found_QM = _found(self.index, query_QD[open_Q], count)
            may_QM = self._may_be(found_QM, position_Q[open_Q])
            # The taken ones first, in their order.
            order_QM = (~may_QM).long().argsort(dim=1, stable=True)
            ordered_QM = found_QM.masked_fill(~may_QM, -1).gather(1, order_QM)
            result_QK[open_Q] = _widened(ordered_QM, k)
            # A search that returned fewer than it was asked for has seen all there is.
            enough_Q = (may_QM.sum(1) >= k) | (found_QM[:, -1] < 0)
            if count == self.num_rows:
                break
            open_Q, wanted = open_Q[~enough_Q], 4 * wanted
        return result_QK

    def _may_be(self, found_QM: Tensor, position_Q: Tensor) -> Tensor:
        may_QM = (found_QM >= 0) & ((found_QM - position_Q[:, None]).abs() >= self.config.band)
        if self.documents is not None:
            own_Q = self.documents.where(position_Q.numpy())[0]
            of_QM = self.documents.where(found_QM.numpy().reshape(-1))[0].reshape(found_QM.shape)
            may_QM &= torch.from_numpy(of_QM != own_Q[:, None])
        return may_QM


def _found(index: Index, query_QD: Tensor, count: int) -> Tensor:
    return by_row_where_equal(index.search(query_QD, count)).ids_NK


def _widened(found_QM: Tensor, k: int) -> Tensor:
    """The first k columns; -1 where there are fewer."""
    if found_QM.shape[1] >= k:
        return found_QM[:, :k]
    return torch.nn.functional.pad(found_QM, (0, k - found_QM.shape[1]), value=-1)


def _made_of(
    config: NeighborsConfig, train: Datastore, queries: Datastore, index: Index, *, is_train: bool
) -> dict[str, Any]:
    file = getattr(index, "name", None)
    made_of: dict[str, Any] = {
        "kind": "neighbors",
        "store": store_digest(train),
        "queries": store_digest(queries),
        "deleted": len(train.deleted),
        "metric": config.faiss_metric_type,
        "index": f"{file_digest(file)}, probe {config.probe}" if file else "exact",
    }
    if is_train:
        made_of |= {"band": config.band, "own_document": not config.exclude_own_document}
        made_of |= {"replaced": not config.no_replacement}
    return made_of


def _warn_of_leaks(config: NeighborsConfig, train: Datastore) -> None:
    """Warn of a band in which keys have read what they would help to predict."""
    context = train.metadata.get("longest_input")
    if isinstance(context, int) and config.band < context:
        logger.warning(
            "--invalid-neighbor-context %d: the keys of %s have read up to %d tokens, so that neighbours at %d have "
            "read what they help to predict; give at least %d and the tokens of a block of training",
            config.band, train.prefix, context, config.band, context,
        )  # fmt: skip


def _require_alike(train: Datastore, queries: Datastore) -> None:
    """Raise ValueError unless both stores hold keys of one model, in the order of their texts."""
    facts: list[tuple[str, Any, Any]] = [("width", train.dim, queries.dim)]
    facts += [(name, train.metadata.get(name), queries.metadata.get(name)) for name in _SHARED]
    for name, one, other in facts:
        if None not in (one, other) and one != other:
            raise ValueError(
                f"datastore {train.prefix!r} and {queries.prefix!r} differ in {name}: {str(one)[:24]} and "
                f"{str(other)[:24]}; save both with one model and one --knn-keytype"
            )
    for store in (train, queries):
        if len(store.deleted):
            raise ValueError(
                f"{len(store.deleted)} rows of datastore {store.prefix!r} are deleted, and positions of the text are "
                "its rows; save it again"
            )
        runs_R3 = store.documents.runs_R3
        later_R = runs_R3[1:, 1:] - runs_R3[:-1, 1:]
        turned_R = (later_R[:, 0] < 0) | ((later_R[:, 0] == 0) & (later_R[:, 1] < 0))
        if turned_R.any():
            row = int(runs_R3[1:, 0][turned_R][0])
            raise ValueError(
                f"datastore {store.prefix!r} is not in the order of its text: row {row} comes before rows of earlier "
                "text; save it with eval_lm.py, without sorting by length"
            )


def _ours(path: str) -> tuple[ChunkedArray, Mapping[str, Any]]:
    if beside(path, "json").exists():
        file = RowFile.open(path)
        _require_kind(path, file)
        return file.rows, file.made_of
    counts = shard_counts(path)
    if not counts:
        RowFile.open(path)  # says what is missing
    if len(counts) > 1:
        raise ValueError(
            f"{path} is there in {counts[0]} shards and in {counts[1]}; remove those of one, so that it is clear which "
            "are meant"
        )
    count = counts[0]
    parts = [RowFile.open(f"{path}{shard_suffix(shard, count)}") for shard in range(count)]
    for part in parts:
        _require_kind(path, part)
        for name, value in parts[0].made_of.items():
            if name != "tokens" and part.made_of.get(name) != value:
                raise ValueError(
                    f"{part.path} and {parts[0].path} are parts of different searches: {name} "
                    f"{part.made_of.get(name)!r} and {value!r}; search again with fairseq-neighbors"
                )
    _require_same_width(parts)
    _require_consecutive(parts)
    arrays = [np.asarray(array) for part in parts for array in part.rows.chunks]
    return ChunkedArray(arrays), {name: value for name, value in parts[0].made_of.items() if name != "tokens"}


def shard_counts(path: str | os.PathLike[str]) -> list[int]:
    """Numbers of shards that files of neighbours of this name have, ascending; none where there is no shard."""
    name, folder = Path(path).name, Path(path).parent
    names = os.listdir(folder) if folder.is_dir() else []
    matches = (re.fullmatch(re.escape(name) + _SHARD_RECORD, each) for each in names)
    return sorted({int(match.group(1)) for match in matches if match})


def _require_consecutive(parts: Sequence[RowFile]) -> None:
    """Raise ValueError unless the tokens of parts follow each other from the first one."""
    first = 0
    for part in parts:
        end = first + len(part)
        if part.made_of.get("tokens") != [first, end]:
            raise ValueError(
                f"{part.path} holds neighbours of tokens {part.made_of.get('tokens')} (first, end), {[first, end]} "
                "belong in its place; copy the right part, or search it again with fairseq-neighbors"
            )
        first = end


def _require_same_width(parts: Sequence[RowFile]) -> None:
    for part in parts:
        one, other = (each.rows.shape[1] for each in (parts[0], part))
        if one != other:
            raise ValueError(
                f"{parts[0].path} keeps {one} neighbours of each token and {part.path} keeps {other}; search one of "
                "them again with fairseq-neighbors and the --k of the other"
            )


def _require_kind(path: str, file: RowFile) -> None:
    if file.made_of.get("kind") != "neighbors":
        raise ValueError(
            f"{path} holds {file.made_of.get('kind', 'other rows')}, not neighbours; name a file of fairseq-neighbors"
        )


def _headerless(path: str) -> tuple[ChunkedArray, Mapping[str, Any]]:
    """The original's raw int64 rows, whose width is the number at the end of the name."""
    match = _HEADERLESS.fullmatch(os.path.basename(path))
    assert match is not None
    k = int(match.group(1))
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}; fairseq-neighbors writes neighbours")
    size = os.path.getsize(path)
    if not k or size % (8 * k) or not size:
        raise ValueError(
            f"{path} has {size} bytes, which are no rows of {k} int64 neighbours as its name says; copy it again"
        )
    return ChunkedArray([np.memmap(path, np.int64, "r", shape=(size // (8 * k), k))]), {}


def _require_rows(path: str, rows: ChunkedArray, num_rows: int) -> None:
    """Raise ValueError if the first or the last rows point beyond the train split."""
    count = max(1, _SAMPLED // rows.shape[1])
    for start in {0, max(0, len(rows) - count)}:
        part = rows.block(start, min(start + count, len(rows)))
        low, high = int(part.min()), int(part.max())
        if low < -1 or high >= num_rows:
            raise ValueError(
                f"{path} names row {high if high >= num_rows else low} of a train split of {num_rows} rows; the "
                "neighbours are of another split: search again with fairseq-neighbors"
            )


def count_missing(file: RowFile) -> int:
    """Tokens that have fewer neighbours than places."""
    step = max(1, _SAMPLED // file.rows.shape[1])
    return sum(
        int((file.rows.block(start, min(start + step, len(file))) < 0).any(1).sum())
        for start in range(0, len(file), step)
    )

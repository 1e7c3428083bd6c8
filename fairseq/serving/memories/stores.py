"""The stores of a server: opened with their indexes, and changed while they are read.

What a server adds goes into a folder beside the store (``PREFIX.served/``): a store that lists the original one and a
shard for each addition. The original stays as it is, and every command of this toolkit reads the folder as a store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.hf.decoding.mixing import OpenMemory
from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.hooks.identity import model_type
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import find_tap
from fairseq.hf.knn.document_rows import document_rows, document_table
from fairseq.hf.knn.stores import (
    DEFAULT_K,
    StorePlace,
    check_fits,
    find_members,
    index_metric,
    open_store,
    store_metadata,
)
from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.delete import delete
from fairseq.memory.datastore.layout import StoreFiles, StoreName
from fairseq.memory.datastore.merge import append, count_documents, join_parts, merge
from fairseq.memory.datastore.writer import DatastoreWriter
from fairseq.memory.index.base import Index
from fairseq.memory.index.exact.index import ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.grown import GrownIndex
from fairseq.memory.index.opening import open_faiss
from fairseq.memory.retomaton.automaton import Retomaton
from fairseq.memory.retomaton.foreign_clusters import open_clusters
from fairseq.memory.sources.external import ExternalMemory
from fairseq.memory.types import Array, Metric
from fairseq.runtime.files import locked, may_create_in
from fairseq.serving.errors import ApiError

logger = logging.getLogger(__name__)

_ADDED = re.compile(r"added-(\d+)")
_JOINED_PARTS = 16
_SHARE = 0.25
"""Rows that the first of the joined parts may have, as a share of the others': 20,000 additions are then 31 parts at
most, and each row is copied 4.6 times."""


@dataclass(frozen=True)
class StoreSettings:
    """Options for opening the stores of a server."""

    k: int | None = None
    """Neighbours of a search; None for 1024, or all rows of a smaller store."""
    probe: int = 32
    """Lists of an index that a search probes."""
    min_knns: int | None = None
    """RetoMaton with so many active pointers needed to skip a search; None for kNN-LM."""
    max_knns: int = 1024
    """Limit on RetoMaton's active pointers."""
    writable: bool = False
    """Documents may be added and deleted."""
    window: int = 512
    """Tokens of a document that the model reads at once."""


class ServedStore:
    """A datastore that is searched by requests, and that documents are added to and deleted from.

    Only the thread that runs the model may call the methods that change it.
    """

    kind = "datastore"

    def __init__(self, name: str, where: str, model: Any, tokenizer: Any, settings: StoreSettings) -> None:
        """Open the store and check that it fits model and tokenizer. ``close`` releases its lock.

        Raises: ValueError when it is missing or does not fit; OSError when another server writes it.
        """
        self.name, self.settings = name, settings
        self._place = StorePlace.find(where, model_type(model))
        self._base = open_store(self._place, with_keys=self._place.index is None)
        self.key_type = _key_type(self._base)
        tap = find_tap(model, self.key_type)
        check_fits(self._base, model, tap, tokenizer)
        self._facts = store_metadata(model, tap, tokenizer)
        self._folder = Path(f"{StoreName.of(self._place.prefix).side_file('served')}")
        self._prefix = os.path.join(self._folder, "")
        self._faiss = self._open_index()
        self._values = self._base.values.in_memory().chunks
        self._warned_of_clusters = False
        with contextlib.ExitStack() as until_open:
            if settings.writable:
                until_open.enter_context(self._begin_writing())
            self._open()
            if settings.k is not None and settings.k > self.store.num_alive:
                raise ValueError(
                    f"--k {settings.k} is larger than datastore {self._place.prefix!r}, which has "
                    f"{self.store.num_alive} rows; give that or less"
                )
            self._closing = until_open.pop_all()

    def close(self) -> None:
        """Release the lock."""
        self._closing.close()

    # Reading

    @property
    def store(self) -> Datastore:
        """The rows as they are now."""
        return self.memory.external.store

    @property
    def default_k(self) -> int:
        """Neighbours of a request that states no number."""
        return min(self.settings.k or DEFAULT_K, self.store.num_alive)

    @property
    def has_documents(self) -> bool:
        """True if the original store records the document of each row."""
        return self._base.has_documents

    def describe(self) -> dict[str, Any]:
        """Facts for clients."""
        store = self.store
        return {
            "name": self.name,
            "kind": "retomaton" if self.memory.automaton is not None else "knn",
            "rows": len(store),
            "deleted_rows": len(store.deleted),
            "documents": count_documents(store) if store.has_documents else None,
            "dim": store.dim,
            "key_type": self.key_type.value,
            "metric": self.memory.external.index.metric.value,
            "index": None if self._place.index is None else self._place.index.name,
            "default_k": self.default_k,
            "writable": self.settings.writable,
        }

    def rows_of(self, document: int) -> Array:
        """Rows of a document. Raises: ApiError for one that is unknown or deleted."""
        store = self.store
        if not store.has_documents or (document < count_documents(self._base) and not self.has_documents):
            raise ApiError(
                404, f"store {self.name!r} does not record documents of its first {len(self._base)} rows", param="id"
            )
        total = count_documents(store)
        rows = store.documents.rows_of([document], len(store)) if 0 <= document < total else np.empty(0, np.int64)
        if not len(rows):
            raise ApiError(
                404,
                f"store {self.name!r} has no document {document}; its documents are 0 to {total - 1}",
                param="id",
                code="document_not_found",
            )
        alive = rows[~np.isin(rows, store.deleted)]
        if not len(alive):
            raise ApiError(
                404, f"document {document} of store {self.name!r} was deleted", param="id", code="document_deleted"
            )
        return np.asarray(alive)

    # Writing

    def add(self, documents: Sequence[Sequence[int]], decoder: RowDecoder) -> Iterator[list[int]]:
        """Add documents, given as tokens, in steps; the last item is their numbers. They are on disk then.

        Raises: ApiError when the keys cannot be stored; nothing is added then.
        """
        self._join_additions()
        prefix = self._next_prefix()
        with DatastoreWriter(prefix, None, self.store.dim, self.store.keys.dtype, self._facts, resume=False) as writer:
            try:
                for rows in document_rows(decoder, documents, self.key_type, self.settings.window):
                    writer.append(rows.key_ND, rows.value_N)
                    yield []
                writer.finish(documents=document_table(documents))
            except BaseException as error:
                writer.discard()
                if isinstance(error, ValueError):
                    raise ApiError(400, f"nothing was added: {error}", param="documents") from error
                raise
        self._make_folder_store()
        first = count_documents(Datastore.open(self._prefix, with_keys=False))
        append(self._prefix, prefix)
        self._open()
        yield list(range(first, first + len(documents)))

    def delete(self, document: int) -> int:
        """Delete a document; returns the number of its rows. Raises: ApiError."""
        rows = self.rows_of(document)
        self._make_folder_store()
        try:
            delete(self._prefix, documents=[document])
        except ValueError as error:
            raise ApiError(400, str(error), param="id") from error
        self._open()
        return len(rows)

    # Opening

    def _open(self) -> None:
        """Open the rows as they are on disk."""
        store = self._base
        if StoreFiles.of(self._prefix).metadata.exists():
            try:
                store = Datastore.open(self._prefix, with_keys=self._base.has_keys)
            except ValueError as error:
                raise ValueError(f"{error}; or move {self._prefix} away, which holds what was added") from error
        later = store.shards[max(1, len(self._base.shards)) :]
        rows = sum(shard.rows for shard in later)
        if len(store) != len(self._base) + rows:
            raise ValueError(
                f"{self._prefix} lists {len(store) - rows} rows of {self._base.prefix!r}, which has {len(self._base)} "
                f"now; move {self._prefix} away"
            )
        values = ChunkedArray([*self._values, *(np.array(shard.values()) for shard in later)], store.values.dtype)
        store = replace(store, values=values)
        index: Index
        if self._faiss is None:
            index = ExactIndex(store.keys, Metric.L2, deleted=store.deleted if len(store.deleted) else None)
        else:
            count, opened = len(self._base), self._faiss
            mine, its = store.deleted[store.deleted < count], store.deleted[store.deleted >= count] - count
            index = FaissIndex(opened.inner, opened.metric, opened.name, deleted=mine)
            if later:
                keys = ChunkedArray([shard.keys() for shard in later], store.keys.dtype)
                index = GrownIndex(index, ExactIndex(keys, opened.metric, deleted=its if len(its) else None))
        score = "recompute" if self._faiss is None else "index"
        k = min(self.settings.k or DEFAULT_K, store.num_alive)
        external = ExternalMemory(store, index, k, score)
        self.memory = OpenMemory(external, self.key_type, self._automaton(external))

    def _automaton(self, external: ExternalMemory) -> Retomaton | None:
        if self.settings.min_knns is None:
            return None
        path, clusters = find_members(self._base.prefix), None
        if path is not None and len(external.store) == len(self._base):
            clusters = open_clusters(path, self._base)
        elif path is not None and not self._warned_of_clusters:
            logger.warning("%s: the clusters of %s are not used, for rows were added since", self.name, path)
            self._warned_of_clusters = True
        return Retomaton(external, min_knns=self.settings.min_knns, max_knns=self.settings.max_knns, clusters=clusters)

    def _open_index(self) -> FaissIndex | None:
        name = self._place.index
        if name is None:
            logger.info("no index beside %s: all keys are compared with every query", self._base.prefix)
            return None
        metric = index_metric(name)
        probe = self.settings.probe
        return open_faiss(
            name, metric, self._base.prefix, self._base.digest, self._base.deleted, probe=probe, mapped=False
        )

    # The folder

    @contextlib.contextmanager
    def _begin_writing(self) -> Iterator[None]:
        """Take the lock that a server holds as long as it runs, and remove what a killed one left unfinished.

        Raises: ValueError for arrays of another program; OSError when another server has the lock.
        """
        if not self._base.shards:
            raise ValueError(
                f"datastore {self._base.prefix!r} has no metadata of ours, which --writable needs; write a copy with "
                "fairseq-datastore convert, or drop --writable"
            )
        may_create_in(self._folder)
        with locked(self._folder / "serving.lock", f"datastore {self._prefix!r}"):
            self._remove_unacknowledged()
            yield

    def _remove_unacknowledged(self) -> None:
        listed = set()
        if StoreFiles.of(self._prefix).metadata.exists():
            listed = {Path(shard.prefix).name for shard in Datastore.open(self._prefix, with_keys=False).shards}
        for path in self._folder.iterdir():
            match = _ADDED.match(path.name)
            if match and match[0] not in listed:
                logger.info("%s is of an addition that was never acknowledged; removed", path)
                path.unlink()

    def _make_folder_store(self) -> None:
        """The store of the folder, which lists the original one, where there is none yet."""
        if not StoreFiles.of(self._prefix).metadata.exists():
            merge(self._prefix, [self._base.prefix])

    def _next_prefix(self) -> str:
        numbers = [int(match[1]) for path in self._folder.iterdir() if (match := _ADDED.match(path.name))]
        return os.path.join(self._folder, f"added-{max(numbers, default=0) + 1:06d}")

    def _join_additions(self) -> None:
        """Make one part of the last ones where there are many: each has files of its own, which every opening reads."""
        num_first = max(1, len(self._base.shards))
        first = first_to_join([shard.rows for shard in self.store.shards[num_first:]])
        if first is not None:
            for old in join_parts(self._prefix, num_first + first, self._next_prefix()):
                for path in self._folder.glob(f"{Path(old).name}[._-]*"):
                    path.unlink()
            self._open()


def first_to_join(rows: Sequence[int]) -> int | None:
    """Number of the first of the last parts that are to become one, given the rows of each; None for none.

    The parts stay few, and few rows are copied often.
    """
    if len(rows) < _JOINED_PARTS or rows[-_JOINED_PARTS] > _SHARE * sum(rows[1 - _JOINED_PARTS :]):
        return None
    return len(rows) - _JOINED_PARTS


def _key_type(store: Datastore) -> KeyType:
    """Place of a store's keys. Raises: ValueError for one of a fairseq model."""
    saved = store.metadata.get("key_tap")
    if saved is None:
        return KeyType.last_ffn_input
    try:
        return KeyType(saved)
    except ValueError:
        raise ValueError(
            f"datastore {store.prefix!r} holds keys of {saved}, which is no place in a transformers model; serve one "
            "that KNNSaver saved"
        ) from None

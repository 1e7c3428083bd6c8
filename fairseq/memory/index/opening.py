"""Opening the index over a datastore, or exact search where no index is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq.memory.index.exact.index import DEFAULT_MEMORY, ExactIndex
from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.types import Array, Metric

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.index.base import Index

logger = logging.getLogger(__name__)


def open_index(
    store: Datastore,
    metric: Metric = Metric.L2,
    name: str | Path | None = None,
    *,
    probe: int = 8,
    mapped: bool = False,
    gpu: bool = True,
    memory_bytes: int = DEFAULT_MEMORY,
) -> Index:
    """The index over a store's keys: a faiss file if one is named, exact search otherwise.

    Args:
        store: an opened datastore.
        metric: metric of the index.
        name: the index file, with or without the metric as its ending; None searches the keys themselves, exactly.
        probe: lists of the index that a search probes.
        mapped: leave the lists on disk and read them as they are probed.
        gpu: search on GPUs if there are any: an index on all that faiss sees, keys on the current one.
        memory_bytes: limit on the working memory of exact search.
    Returns: an object with ``search(query_ND, k)`` and ``score_rows(query_ND, ids_NM)``.
    Raises: ValueError or OSError when the index is missing, damaged or was built over other keys.

    ```python
    index = open_index(store, Metric.L2)  # no file: exact
    index = open_index(store, Metric.L2, "store.index", probe=4)
    ```
    """
    if not name:
        if not store.has_keys:
            raise ValueError(
                "--no-load-keys and --knn-sim-func do_not_recomp_l2 take the scores of an index: give --indexfile "
                "NAME, or drop them to search the keys themselves"
            )
        logger.info("no --indexfile: all %d keys are compared with every query", len(store))
        exact = ExactIndex(store.keys, metric, memory_bytes=memory_bytes, deleted=store.deleted)
        if gpu:
            exact.use_gpus()
        return exact
    index = open_faiss(name, metric, store.prefix, store.digest, store.deleted, probe=probe, mapped=mapped)
    if gpu:
        index.use_gpus()
    return index


def open_faiss(
    name: str | Path,
    metric: Metric,
    prefix: str,
    digest: str | None,
    deleted: Array,
    *,
    probe: int,
    mapped: bool,
) -> FaissIndex:
    """The index in a faiss file, which must have been built over the keys of the store with this digest.

    Raises: ValueError or OSError as ``open_index``.
    """
    index = FaissIndex.open(name, metric, mapped=mapped, deleted=deleted)
    index.set_probe(probe)
    if None not in (digest, index.fingerprint()) and digest != index.fingerprint():
        raise ValueError(
            f"{index.name} was built over other keys than datastore {prefix!r} holds now; rebuild it with "
            "build_dstore.py"
        )
    if digest is not None and index.fingerprint() is None:
        logger.warning(
            "%s does not say over which keys it was built; if datastore %r changed since, its neighbours are wrong: "
            "rebuild it with build_dstore.py",
            index.name,
            prefix,
        )
    return index

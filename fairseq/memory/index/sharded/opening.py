"""Opening the index whose ranges are searched by Ray actors, started for it or found in the cluster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq.memory.index.opening import open_index
from fairseq.memory.index.sharded.index import ShardedIndex
from fairseq.memory.index.sharded.ranges import (
    RowRange,
    SearchSettings,
    check_count,
    check_cpus,
    check_not_replaced,
    cut,
    default_workers,
    service_name,
)
from fairseq.memory.index.sharded.server import RangeServer
from fairseq.runtime.ray_cluster import RayActors, connect, nodes

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.index.base import Index

logger = logging.getLogger(__name__)

_READY = "describe"


def open_search(
    store: Datastore,
    settings: SearchSettings,
    indexfile: str | Path | None = None,
    *,
    search_on: str | None = None,
    search_workers: int | None = None,
) -> Index:
    """The index over a store in this process, or by Ray actors where ``search_on`` names a cluster.

    Raises: ValueError or OSError as ``open_index`` and ``open_sharded_index``.
    """
    if search_on is not None:
        return open_sharded_index(store, search_on, settings, str(indexfile) if indexfile else None, search_workers)
    return open_index(
        store,
        settings.metric,
        indexfile,
        probe=settings.probe,
        mapped=settings.mapped,
        gpu=settings.gpu,
        memory_bytes=settings.memory_bytes,
    )


def open_sharded_index(
    store: Datastore,
    target: str,
    settings: SearchSettings,
    indexfile: str | None = None,
    num_workers: int | None = None,
) -> ShardedIndex:
    """The index over a store whose rows are searched by actors on ``target``.

    Actors that ``serve`` keeps for the same content and settings are used, whatever their number.

    Args:
        target: ``ray`` starts Ray on this machine; ``ray://HOST:PORT`` is a running cluster.
        indexfile: one faiss index over the store, or one for each shard (NAME.partI-of-N); None for exact search.
        num_workers: ranges of rows; by default one a shard or a node. An index decides it by itself.
    Raises: ValueError or OSError with the way out when files, Ray or the cluster are missing or do not fit.
    """
    _check_workers(store, indexfile, settings, num_workers)
    connect(target, RangeServer)
    ranges = _ranges(store, indexfile, settings, num_workers)
    found = None
    if target != "ray" and store.digest:
        name = service_name(store, ranges)
        found = RayActors.find(name, _READY)
        check_not_replaced(store, name, RayActors.services())
    if found is not None:
        logger.info("datastore %s is served by %d actors of %s", store.prefix, len(found), target)
    return _index(found or _start(ranges), store, ranges)


def serve(
    store: Datastore,
    target: str,
    settings: SearchSettings,
    indexfile: str | None = None,
    num_workers: int | None = None,
) -> tuple[ShardedIndex, RayActors, str]:
    """Start actors that other processes find until this one ends: index, actors and address of the cluster.

    Raises: ValueError or OSError as ``open_sharded_index``, and when the store is served already.
    """
    _check_workers(store, indexfile, settings, num_workers)
    address = connect(target, RangeServer)
    ranges = _ranges(store, indexfile, settings, num_workers)
    name = service_name(store, ranges)
    if RayActors.find(name, _READY) is not None:
        raise ValueError(
            f"datastore {store.prefix!r} is served at {address} already; search it with --search-on {target}"
        )
    actors = _start(ranges, name)
    try:
        return _index(actors, store, ranges), actors, address
    except BaseException:
        actors.end()
        raise


def _index(actors: RayActors, store: Datastore, ranges: list[RowRange]) -> ShardedIndex:
    files = [each.indexfile for each in ranges if each.indexfile]
    return ShardedIndex(actors, len(store), store.prefix, files)


def _check_workers(store: Datastore, indexfile: str | None, settings: SearchSettings, num_workers: int | None) -> None:
    """Raise ValueError for a number of workers that a store is too small for, or an index does not have."""
    check_count(num_workers, len(store), store.prefix)
    if indexfile is None or num_workers is None:
        return
    count = default_workers(store, indexfile, settings, 1)
    if num_workers != count:
        raise ValueError(
            f"--search-workers {num_workers}: --indexfile {indexfile} is searched by {count}, because an index cannot "
            "be cut; drop the flag, or build an index for each shard (NAME.partI-of-N)"
        )


def _ranges(
    store: Datastore, indexfile: str | None, settings: SearchSettings, num_workers: int | None
) -> list[RowRange]:
    machines = nodes()
    check_cpus(num_workers, sum(machine.cpus for machine in machines))
    count = num_workers or default_workers(store, indexfile, settings, len(machines))
    if num_workers is None and indexfile is None and len(machines) == 1:
        # All files are here, and each actor takes 1 s of a CPU to import Ray.
        count = min(count, max(1, int(machines[0].cpus)))
    return cut(store, indexfile, settings, count)


def _start(ranges: list[RowRange], service: str | None = None) -> RayActors:
    return RayActors.start(RangeServer, ranges, [each.paths for each in ranges], _READY, service)

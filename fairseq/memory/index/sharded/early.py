"""Starting a search by Ray actors before its store is known, so that Ray starts while a model is loaded."""

from __future__ import annotations

from fairseq.runtime.ray_cluster import begin_connecting

_SERVER = "fairseq.memory.index.sharded.server"  # a name, because importing it takes 2 s


def begin_search(target: str | None) -> None:
    """Begin to start Ray, or to join the cluster, in the background; ``open_search`` then waits, and raises its errors.

    Args:
        target: value of --search-on; None does nothing.
    """
    if target is not None:
        begin_connecting(target, _SERVER)

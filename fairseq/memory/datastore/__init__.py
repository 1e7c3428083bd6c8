"""Datastores: keys and values on disk, written crash-safely, opened memory-mapped, in shards or whole."""

from typing import TYPE_CHECKING

from fairseq.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.datastore.writer import DatastoreWriter

__all__ = ["Datastore", "DatastoreWriter"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"Datastore": "fairseq.memory.datastore.datastore", "DatastoreWriter": "fairseq.memory.datastore.writer"},
)

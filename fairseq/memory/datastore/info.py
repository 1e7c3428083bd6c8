"""Summary of a datastore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.memory.datastore.chunked_array import ChunkedArray, nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.metadata import Shard, content_digest
from fairseq.memory.datastore.reading.read_ahead import iter_blocks

_BLOCK_BYTES = 32 << 20


def describe(store: Datastore) -> dict[str, Any]:
    """Figures and metadata as plain types; digests of files are those of the metadata."""
    summary: dict[str, Any] = {"prefix": store.prefix, "rows": len(store), "deleted": len(store.deleted)}
    summary |= {"alive": store.num_alive, "dim": store.dim, "key_dtype": store.keys.dtype}
    summary |= {"value_dtype": store.values.dtype, "bytes": store.keys.nbytes + store.values.nbytes}
    summary |= {"digest": store.digest, "described": bool(store.metadata)}
    documents = {"num_documents": store.metadata.get("num_documents")} if store.has_documents else {}
    files = {"checksums", "block_bytes", "keys_file", "values_file", "documents_file", "parts", "complete"}
    files |= {"deleted_checksum"}
    others = {name: value for name, value in store.metadata.items() if name not in summary.keys() | files}
    shards = [_describe_shard(shard) for shard in store.shards]
    return summary | others | documents | {"parts": shards}


def _describe_shard(shard: Shard) -> dict[str, Any]:
    return {"prefix": shard.prefix, "rows": shard.rows, "digest": content_digest(shard.metadata)}


@dataclass(frozen=True)
class KeyCounts:
    """Counts of invalid keys."""

    nonfinite: int
    """Keys that hold NaN or infinity."""
    zero: int
    """Keys of zeros only, such as rows that a program allocated and never wrote."""


def count_keys(keys: ChunkedArray) -> KeyCounts:
    """Read all keys and count the invalid ones."""
    infinite = zero = 0
    step = max(1, _BLOCK_BYTES // (4 * keys.shape[1]))
    for _, block_ND in iter_blocks(keys, step):
        infinite += len(nonfinite(block_ND))
        zero += int((~block_ND[block_ND[:, 0] == 0].any(dim=1)).sum())
    return KeyCounts(infinite, zero)

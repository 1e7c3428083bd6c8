"""Summary of a datastore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.memory.datastore.chunked_array import ChunkedArray, nonfinite
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.metadata import Part, content_digest

_BLOCK_BYTES = 32 << 20


def describe(store: Datastore) -> dict[str, Any]:
    """Figures and metadata as plain types; digests of files come as they are in the metadata."""
    summary: dict[str, Any] = {"prefix": store.prefix, "rows": len(store), "deleted": len(store.deleted)}
    summary |= {"alive": store.num_alive, "dim": store.dim, "key_dtype": store.keys.dtype}
    summary |= {"value_dtype": store.values.dtype, "bytes": store.keys.nbytes + store.values.nbytes}
    summary |= {"digest": store.digest, "described": bool(store.metadata)}
    held = {"num_documents": store.metadata.get("num_documents")} if store.has_documents else {}
    files = {"checksums", "block_bytes", "keys_file", "values_file", "documents_file", "parts", "complete"}
    more = {name: value for name, value in store.metadata.items() if name not in summary.keys() | files}
    parts = [_part(part) for part in store.parts]
    return summary | more | held | {"parts": parts}


def _part(part: Part) -> dict[str, Any]:
    return {"prefix": part.prefix, "rows": part.rows, "digest": content_digest(part.about)}


@dataclass(frozen=True)
class KeyCounts:
    """Keys that are no keys."""

    nonfinite: int
    """That hold NaN or infinity."""
    zero: int
    """That are all zeros, as the rows are that a program announced and never wrote."""


def count_keys(keys: ChunkedArray) -> KeyCounts:
    """Read all keys and count."""
    infinite = zero = 0
    step = max(1, _BLOCK_BYTES // (4 * keys.shape[1]))
    for start in range(0, len(keys), step):
        block_ND = keys.block(start, start + step)
        infinite += len(nonfinite(block_ND))
        zero += int((~block_ND[block_ND[:, 0] == 0].any(dim=1)).sum())
    return KeyCounts(infinite, zero)

"""What decides the content of a file of saved neighbours, whichever command saves it."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fairseq.memory.retrieval.file import store_digest
from fairseq.runtime.manifest import file_digest

if TYPE_CHECKING:
    from fairseq.data.dictionary import Dictionary
    from fairseq.memory.datastore.datastore import Datastore
    from fairseq.memory.index.base import Index
    from fairseq.memory.sources.external import ExternalMemory
    from fairseq.memory.types import Array


def facts_of_text(
    prefixes: Sequence[str], batches: Sequence[Array], dictionary: Dictionary, sizes: Sequence[Array]
) -> dict[str, Any]:
    """Identity of what is scored, and in which order.

    Args:
        sizes: tokens of each example, and what else tells how the text was cut.
        prefixes: of the binarised texts, without ``.bin``.
        batches: numbers of the examples that the model reads together.
        dictionary: of the scored tokens.
    """
    read = [np.asarray(side)[batch] for side in sizes for batch in batches]
    numbers = np.concatenate([[len(batches)], [len(batch) for batch in batches], *batches]).astype(np.int64)
    return {
        "text_digest": " ".join(file_digest(f"{prefix}.bin") for prefix in prefixes),
        "batches_digest": hashlib.sha256(numbers.tobytes()).hexdigest(),
        "dictionary_digest": dictionary.digest(),
        "dictionary_size": len(dictionary),
        "sizes": f"crc {zlib.crc32(np.concatenate(read).astype('<i8').tobytes()):08x}",
    }


def facts_of_model(
    path: str, model: nn.Module, overrides: dict[str, Any] | None, key_tap: str | None
) -> dict[str, Any]:
    """Identity of the model that scores and makes the queries."""
    return {
        "model_digest": file_digest(path),
        "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "model_overrides": repr(sorted((overrides or {}).items())),
        "key_tap": key_tap,
    }


def facts_of_store(store: Datastore) -> dict[str, Any]:
    """Identity of the rows of a store that can be found."""
    return {
        "store_digest": store_digest(store),
        "store_rows": len(store),
        "dim": store.dim,
        "deleted": f"{len(store.deleted)} rows, crc {zlib.crc32(store.deleted.tobytes()):08x}",
    }


def facts_of_search(memory: ExternalMemory, probe: int) -> dict[str, Any]:
    """Identity of the store and of how it is searched; ``probe`` counts where there is an index file."""
    index = memory.index
    files = _index_files(index)
    return {
        **facts_of_store(memory.store),
        "index": ", ".join([*map(file_digest, files), f"probe {probe}"]) if files else "exact",
        "metric": index.metric.value,
        "score": memory.score,
        "k": memory.k,
    }


def place_of_store(memory: ExternalMemory) -> dict[str, Any]:
    """Where store and index lay, for programs that open them again."""
    store = memory.store
    described = {
        "prefix": os.path.abspath(store.prefix),
        "key_dtype": store.keys.dtype,
        "described": bool(store.metadata),
    }
    return {"store": described, "index": ", ".join(_index_files(memory.index)) or "exact"}


def _index_files(index: Index) -> list[str]:
    """The faiss indexes that are searched, one or one a shard; none for exact search."""
    name = getattr(index, "name", None)
    return [str(name)] if name else list(getattr(index, "index_files", ()))

"""Names, types and schemas of the files that make up a datastore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.runtime.records import CRC, FLAG, OBJECT, POSITIVE, SUMS, TEXT, WHOLE, Fields, Items, Nullable, one_of

FORMAT_VERSION = 1


KEY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype("uint16"),
}
"""Types of keys and their numpy types; numpy has no bfloat16, so its 16 bits are uint16."""
VALUE_DTYPES = ("int64", "int32", "int16")
"""Types of values; ours are int64."""

_TYPES = {"dim": POSITIVE, "key_dtype": one_of(*KEY_DTYPES), "value_dtype": one_of(*VALUE_DTYPES)}
_PART = Fields({"prefix": TEXT, "rows": WHOLE, "digest": Nullable(TEXT), "first_document": WHOLE})

STORE = Fields(
    {"format_version": POSITIVE, "complete": FLAG, "rows": WHOLE, **_TYPES},
    {
        "block_bytes": POSITIVE,
        "checksums": Fields({"keys": Items(CRC), "values": Items(CRC)}, {"documents": Items(CRC)}),
        "parts": Items(_PART, at_least=1),
        "deleted": WHOLE,
        "deleted_checksum": CRC,
        "generation": WHOLE,
        "compaction": Fields({"request": TEXT, "rows_before": WHOLE, "replaced": Items(TEXT)}),
        "first_row": WHOLE,
        **{name: Nullable(TEXT) for name in ("keys_file", "values_file", "documents_file", "key_tap")},
        **{name: Nullable(TEXT) for name in ("dictionary_digest", "model_digest", "model_dtype", "batches_digest")},
        **{name: Nullable(WHOLE) for name in ("dictionary_size", "context_window", "num_documents")},
    },
)
"""``<prefix>.json``; a store has either ``parts`` or ``checksums``."""

PROGRESS = Fields(
    {
        "signature": Fields({"rows": Nullable(WHOLE), "metadata": OBJECT, **_TYPES}),
        "rows_done": WHOLE,
        "cursor": Nullable(OBJECT),
        "checksums": Fields({"keys": SUMS, "values": SUMS}),
        "block_bytes": POSITIVE,
        "finishing": FLAG,
    },
    {"documents": Items(CRC)},
)
"""``<prefix>.progress.json`` of a store that is being saved."""


_ENDINGS = {"metadata": "json", "progress": "progress.json", "lock": "lock"}


@dataclass(frozen=True)
class StoreFiles:
    """The names of a store's files."""

    keys: Path
    values: Path
    documents: Path
    deleted: Path
    metadata: Path
    progress: Path
    lock: Path

    @classmethod
    def of(cls, prefix: str | Path, dtype: str) -> StoreFiles:
        """The names for a prefix and a key type.

        A prefix that ends with a slash, or a folder that holds a store, names a folder: its files have kNN-MT's names.
        """
        folder = Path(prefix)
        is_folder = str(prefix).endswith("/") or (
            not Path(f"{prefix}.json").exists()
            and any((folder / f"datastore{end}").exists() for end in (".json", ".progress.json"))
        )
        if is_folder:
            plain = {"keys": "keys.npy", "values": "vals.npy", "documents": "docs.npy", "deleted": "deleted.npy"}
            ours = {name: f"datastore.{end}" for name, end in _ENDINGS.items()}
            return cls(**{name: folder / file for name, file in (plain | ours).items()})
        infix = {"float16": "-fp16", "bfloat16": "-bf16"}.get(dtype, "")
        names = {"keys": f"{infix}_keys.npy", "values": "_vals.npy", "documents": "_docs.npy"}
        names |= {"deleted": ".deleted.npy"} | {name: f".{end}" for name, end in _ENDINGS.items()}
        return cls(**{name: Path(f"{prefix}{suffix}") for name, suffix in names.items()})

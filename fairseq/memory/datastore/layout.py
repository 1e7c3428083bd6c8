"""Names and types of the files that make up a datastore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1


KEY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype("uint16"),
}
"""Types of keys and their numpy types; numpy has no bfloat16, so its 16 bits are uint16."""


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
        """The names for a prefix and a key type."""
        infix = {"float16": "-fp16", "bfloat16": "-bf16"}.get(dtype, "")
        names = {"keys": f"{infix}_keys.npy", "values": "_vals.npy", "documents": "_docs.npy"}
        names |= {"deleted": ".deleted.npy", "metadata": ".json", "progress": ".progress.json", "lock": ".lock"}
        return cls(**{name: Path(f"{prefix}{suffix}") for name, suffix in names.items()})

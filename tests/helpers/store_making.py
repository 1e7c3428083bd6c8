"""Small stores for the tests of what looks after them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairseq.memory.datastore.writer import DatastoreWriter

DIM = 4
META = {"key_tap": "last_ffn_input", "dictionary_digest": "d" * 64, "dictionary_size": 50, "model_digest": "m" * 20}


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, DIM), dtype=np.float32), rng.integers(0, 50, n)


def runs(*lengths: int) -> np.ndarray:
    """Documents of these lengths, one after another."""
    return np.array([[sum(lengths[:number]), number, 0] for number in range(len(lengths))])


def save(
    prefix: Path, n: int, *, seed: int = 0, dtype: str = "float32", documents: tuple[int, ...] = (), **about: object
) -> tuple[np.ndarray, np.ndarray]:
    """Write a store of ``n`` rows; returns them."""
    keys, values = rows(n, seed)
    told = META | ({"num_documents": len(documents)} if documents else {}) | about
    with DatastoreWriter(prefix, n, DIM, dtype, told, documents=runs(*documents) if documents else None) as writer:
        writer.append(keys, values)
        writer.finish()
    return keys, values


def save_keys(prefix: Path, keys: np.ndarray) -> Path:
    """Write a store of these keys in float32, each with its number as value."""
    with DatastoreWriter(prefix, *keys.shape, "float32", {}) as writer:
        writer.append(keys, np.arange(len(keys)))
        writer.finish()
    return prefix

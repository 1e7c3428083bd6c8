"""Features of the train positions: the keys of a store as they are, or their product-quantizer codes.

Shapes: P positions, N positions of the split, D width, M bytes of a code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.gnn.codec import ProductQuantizer
from fairseq.memory.gnn.row_file import RowFile, RowWriter, existing
from fairseq.memory.retrieval.file import store_digest
from fairseq.memory.types import Array

_ENCODED_AT_ONCE = 1 << 14


class NodeFeatures(Protocol):
    """What the network reads of train positions before its first layer."""

    @property
    def dim(self) -> int:
        """Width."""
        ...

    @property
    def digest(self) -> str:
        """Identity of the content; states computed from it belong to it."""
        ...

    def __len__(self) -> int: ...

    def take(self, position_P: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of some positions, (P, D) in float32."""
        ...


@dataclass(frozen=True)
class KeyFeatures:
    """Keys of a store, read from disk as they are used.

    ```python
    features = KeyFeatures.of(Datastore.open("store"))
    features.take(torch.tensor([0, 3])).shape  # (2, 16)
    ```
    """

    keys: ChunkedArray
    digest: str

    @classmethod
    def of(cls, store: Datastore) -> KeyFeatures:
        """Keys of a store whose rows are the train split in its order. Raises: ValueError when rows are deleted."""
        _require_whole(store)
        return cls(store.keys, f"keys {store_digest(store)}")

    @property
    def dim(self) -> int:
        """Width."""
        return self.keys.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, position_P: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of some positions, (P, D) in float32."""
        return self.keys.take(position_P).to(device)


@dataclass(frozen=True)
class CodedFeatures:
    """Product-quantizer codes of a store's keys, decoded on the device that reads them.

    ```python
    codec = ProductQuantizer.train(sample_of(store, 500), num_bytes=4)
    features = encode_store(store, codec, "codes.npy")
    features.take(torch.tensor([0, 3])).shape  # (2, 16)
    ```
    """

    codes: RowFile
    codec: ProductQuantizer

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], codec: ProductQuantizer, store: Datastore | None = None
    ) -> CodedFeatures:
        """Codes on disk.

        Args:
            store: the one whose keys they should be of; None compares nothing.
        Raises: ValueError when they are missing or damaged, or of another codec or store.
        """
        codes = RowFile.open(path)
        wanted = {"codec": codec.digest} | ({} if store is None else {"store": store_digest(store)})
        for name, value in wanted.items():
            if codes.made_of.get(name) != value:
                raise ValueError(
                    f"{os.fspath(path)} holds codes of another {name} ({str(codes.made_of.get(name))[:12]}) than this "
                    f"one ({value[:12]}); give the {name} they were made with, or encode the store again"
                )
        if store is not None and len(store) != len(codes):
            raise ValueError(
                f"{os.fspath(path)} holds {len(codes)} codes, the store {len(store)} keys; encode it again"
            )
        return cls(codes, codec)

    @property
    def dim(self) -> int:
        """Width."""
        return self.codec.dim

    @property
    def digest(self) -> str:
        """Identity of the content."""
        return f"codes {self.codes.made_of['store']} by {self.codec.digest}"

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, position_P: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Features of some positions, (P, D) in the codec's type."""
        return self.codec.to(device).decode(self.codes.rows.take(position_P).to(device))


def sample_of(store: Datastore, count: int, seed: int = 0) -> Array:
    """Keys of a random sample of the rows, float32, in file order: a codec learns from all of the text."""
    rows = np.sort(np.random.default_rng(seed).choice(len(store), min(count, len(store)), replace=False))
    return store.take_keys(rows)


def encode_store(store: Datastore, codec: ProductQuantizer, path: str | os.PathLike[str]) -> CodedFeatures:
    """Write the codes of all keys, or resume; returns them opened. Complete ones are kept.

    Raises: ValueError when the widths differ, or the file is there and made of something else.
    """
    _require_whole(store)
    if codec.dim != store.dim:
        raise ValueError(
            f"the codec is of width {codec.dim}, datastore {store.prefix!r} has keys of width {store.dim}; train one "
            "on this store"
        )
    made_of = {"kind": "codes", "store": store_digest(store), "codec": codec.digest}
    if existing(path, made_of) is None:
        with RowWriter(path, len(store), codec.num_bytes, "uint8", made_of) as writer:
            while writer.rows_done < len(store):
                keys_ND = store.keys.block(writer.rows_done, writer.rows_done + _ENCODED_AT_ONCE)
                writer.append(codec.encode(keys_ND.float()))
                writer.checkpoint_when_due()
            writer.finish()
    return CodedFeatures.open(path, codec, store)


def _require_whole(store: Datastore) -> None:
    if len(store.deleted):
        raise ValueError(
            f"{len(store.deleted)} rows of datastore {store.prefix!r} are deleted, and positions of the text are its "
            "rows; save it again"
        )

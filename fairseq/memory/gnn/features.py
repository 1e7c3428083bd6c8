"""Features of the train positions: the keys of a store as they are, or their product-quantizer codes.

Shapes: P positions, N positions of the split, D width, M bytes of a code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray, nonfinite
from fairseq.memory.datastore.config import QuantizeConfig
from fairseq.memory.datastore.datastore import Datastore
from fairseq.memory.datastore.reading.read_ahead import iter_blocks
from fairseq.memory.gnn.codec import ProductQuantizer, require_learnable
from fairseq.memory.gnn.row_file import RowFile, RowWriter, beside, describes_rows, existing, file_bytes, require_ours
from fairseq.memory.retrieval.file import store_digest
from fairseq.memory.types import Array
from fairseq.runtime.files import may_create_in, require_free_space

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

    @classmethod
    def with_codec(cls, path: str | os.PathLike[str], store: Datastore) -> CodedFeatures | None:
        """Codes on disk with the codec that lies beside them, ``PATH.codec``; None where there are neither.

        Raises: ValueError when one of the two is missing, and as :meth:`open`.
        """
        codec = beside(path, "codec")
        if codec.is_file():
            return cls.open(path, ProductQuantizer.load(codec)[0], store)
        if describes_rows(beside(path, "json")):
            raise ValueError(
                f"{os.fspath(path)} holds codes and their codec is not at {codec}; copy the codec of fairseq-datastore "
                "quantize there"
            )
        return None

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


def encode_store(
    store: Datastore,
    codec: ProductQuantizer,
    path: str | os.PathLike[str],
    report: Callable[[int, int], object] = lambda done, total: None,
) -> CodedFeatures:
    """Write the codes of all keys, or resume; returns them opened. Complete ones are kept.

    Args:
        report: is given the keys done and those there are, after each bulk.
    Raises: ValueError when the widths differ, a key is not finite, or the file is there and made of something else.
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
            for start, block_ND in iter_blocks(store.keys, _ENCODED_AT_ONCE, writer.rows_done):
                keys_ND = block_ND.float()
                _require_finite(store, keys_ND, f"{start} and after")
                writer.append(codec.encode(keys_ND))
                report(writer.rows_done, len(store))
                writer.checkpoint_when_due()
            writer.finish()
    return CodedFeatures.open(path, codec, store)


@dataclass(frozen=True)
class Quantized:
    """Codes of a store, and the error of their codec."""

    features: CodedFeatures
    error: float
    """Mean of |x - decode(encode(x))|^2 / |x|^2 over keys the codec was not trained on."""
    num_sampled: int
    """Keys the codec was trained on."""
    num_held_out: int
    """Keys the error was measured on."""


def quantize_store(
    config: QuantizeConfig, store: Datastore, report: Callable[[int, int], object] = lambda done, total: None
) -> Quantized:
    """Train a codec on a sample of a store's keys, or take the trained one, and write the codes of all, or resume.

    Args:
        report: as of :func:`encode_store`.
    Raises: ValueError with both values when the codec's file is of another store or of other settings, the bytes do
        not divide the width, or the store is too small; before the long part.
    """
    require_ours(config.out)
    _require_whole(store)
    num_bytes, rotate = config.codec_of(store.dim)
    num_held_out = min(config.held_out, len(store) // 10)
    num_sampled = min(config.sample, len(store) - num_held_out)
    require_learnable(num_sampled, store.dim, num_bytes)
    made_of = {
        "store": store_digest(store),
        "codec": f"{f'OPQ{num_bytes},' if rotate else ''}PQ{num_bytes}",
        "sample": str(num_sampled),
        "held_out": str(num_held_out),
        "seed": str(config.seed),
    }
    there = _trained(config.codec_path, made_of, store) if os.path.exists(config.codec_path) else None
    # One draw without replacement, so that no key is in both parts.
    row_N = np.random.default_rng(config.seed).choice(len(store), num_sampled + num_held_out, replace=False)
    if there is None:
        if beside(config.out, "json").exists():
            raise ValueError(
                f"{config.out} is complete and the codec it was made with is not at {config.codec_path}; name its "
                "--codec-file, or remove the codes"
            )
        folder = Path(config.out).absolute().parent
        may_create_in(folder)
        num_bytes_out = file_bytes(len(store), num_bytes, "uint8")
        require_free_space(folder, num_bytes_out, config.out, "choose a --codec of fewer bytes")
        sample_ND = store.take_keys(np.sort(row_N[:num_sampled]))
        _require_finite(store, torch.from_numpy(sample_ND), "of the sample")
        there = ProductQuantizer.train(sample_ND, num_bytes, rotate=rotate, seed=config.seed)
        there.save(config.codec_path, made_of)
    features = encode_store(store, there, config.out, report)
    error = there.relative_error(torch.from_numpy(store.take_keys(np.sort(row_N[num_sampled:]))))
    return Quantized(features, error, num_sampled, num_held_out)


def _trained(path: str, made_of: Mapping[str, str], store: Datastore) -> ProductQuantizer:
    """The codec of a file. Raises: ValueError with both values when it was made of anything else."""
    codec, there = ProductQuantizer.load(path)
    if codec.dim != store.dim:
        raise ValueError(
            f"{path} holds a codec of width {codec.dim}, datastore {store.prefix!r} has keys of width {store.dim}; "
            "name another --codec-file"
        )
    for name, value in made_of.items():
        if there.get(name, value) != value:
            raise ValueError(
                f"the {name} of the codec in {path} is {there[name][:24]}, that of this command is {value[:24]}; name "
                "another --codec-file, or remove it"
            )
    if f"PQ{codec.num_bytes}" != made_of["codec"].rpartition(",")[2]:
        raise ValueError(
            f"{path} holds a codec of {codec.num_bytes} bytes, this command is of {made_of['codec']}; name another "
            "--codec-file, or give --codec of its bytes"
        )
    return codec


def _require_finite(store: Datastore, key_ND: Tensor, which: str) -> None:
    wrong_N = nonfinite(key_ND)
    if len(wrong_N):
        raise ValueError(
            f"{len(wrong_N)} keys of datastore {store.prefix!r} (rows {which}) hold NaN or infinity, which no codec "
            "holds; save it again, in float32"
        )


def _require_whole(store: Datastore) -> None:
    if len(store.deleted):
        raise ValueError(
            f"{len(store.deleted)} rows of datastore {store.prefix!r} are deleted, and positions of the text are its "
            "rows; save it again"
        )

"""A product quantizer after a rotation: vectors as bytes, decoded on any device by one lookup and one product.

Source: Jegou et al., Product Quantization for Nearest Neighbor Search (2011); Ge et al., Optimized Product Quantization
(2013). faiss trains it.

Shapes: N vectors, D width, M bytes of a code, J centroids of a byte, W width of a sub-vector.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.types import Array, Metric
from fairseq.runtime.atomic_files import replacing
from fairseq.runtime.files import DAMAGED
from fairseq.runtime.tensor_files import read_tensor_file, sort_metadata

FORMAT = "fairseq-memory product quantizer 2"
_BEFORE = "fairseq-memory product quantizer 1"  # without a digest of what is said about the codec
CENTROIDS = 256
_SEAL = "metadata_digest"
_CHUNK_NUMBERS = 4 << 20
"""Distances at a time: 16 MB."""


def require_learnable(count: int, dim: int, num_bytes: int) -> None:
    """Raise ValueError when the bytes do not divide the width, or there are too few vectors."""
    if num_bytes < 1 or dim % num_bytes:
        divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise ValueError(f"{num_bytes} bytes do not divide a width of {dim}; give one of {divisors}")
    if count < CENTROIDS:
        raise ValueError(
            f"{count} vectors are too few to learn {CENTROIDS} centroids from; give more, or keep the features as they "
            "are"
        )


@dataclass(frozen=True)
class ProductQuantizer:
    """Rotation and centroids; ``decode(encode(x))`` is near ``x``.

    ```python
    codec = ProductQuantizer.train(key_ND.numpy(), num_bytes=4)
    code_NM = codec.encode(key_ND)  # uint8
    error = codec.relative_error(key_ND)  # mean of |x - decode(encode(x))|^2 / |x|^2
    ```
    """

    centroid_MJW: Tensor
    """Floating, of the rotated vectors' parts."""
    rotation_DD: Tensor | None = None
    """Orthogonal; a vector x is encoded as x R^T + offset. None rotates nothing."""
    offset_D: Tensor | None = None
    """Added after the rotation; None adds nothing."""

    def __post_init__(self) -> None:
        shapes = {"rotation": (self.rotation_DD, (self.dim, self.dim)), "offset": (self.offset_D, (self.dim,))}
        for name, (value, wanted) in shapes.items():
            if value is not None and tuple(value.shape) != wanted:
                raise ValueError(
                    f"the quantizer's {name} is {tuple(value.shape)}, its centroids make vectors of width {self.dim}; "
                    "give parts of one quantizer"
                )

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.centroid_MJW.shape[0] * self.centroid_MJW.shape[2])

    @property
    def num_bytes(self) -> int:
        """Bytes of a code."""
        return len(self.centroid_MJW)

    @classmethod
    def train(cls, sample_ND: Array, num_bytes: int, *, rotate: bool = True, seed: int = 0) -> ProductQuantizer:
        """Learn from a sample, as it is (not scaled).

        Args:
            num_bytes: bytes of a code; a divisor of the width.
            rotate: learn a rotation first, which takes most of the time and lowers the error.
        Raises: ValueError when the bytes do not divide the width, or there are too few vectors.
        """
        # Only where it is needed: training networks and reading codes does without faiss and what belongs to it.
        from fairseq.memory.index.faiss.builder import FaissBuilder
        from fairseq.memory.index.faiss_library import faiss_library

        count, dim = sample_ND.shape
        require_learnable(count, dim, num_bytes)
        factory = f"OPQ{num_bytes}_{dim},PQ{num_bytes}" if rotate else f"PQ{num_bytes}"
        builder = FaissBuilder.new(factory, dim, Metric.L2, seed)
        builder.train(sample_ND)
        faiss = faiss_library()
        inner = builder.inner
        rotation = offset = None
        if rotate:
            chain = faiss.downcast_VectorTransform(inner.chain.at(0))
            rotation = torch.from_numpy(faiss.vector_to_array(chain.A).reshape(dim, dim).copy())
            biases = faiss.vector_to_array(chain.b)
            offset = torch.from_numpy(biases.copy()) if len(biases) else None
            inner = faiss.downcast_index(inner.index)
        centroids = faiss.vector_to_array(inner.pq.centroids).reshape(num_bytes, CENTROIDS, dim // num_bytes)
        return cls(torch.from_numpy(centroids.copy()), rotation, offset)

    def encode(self, vector_ND: Tensor) -> Tensor:
        """uint8 (N, M): the nearest centroid of each part."""
        vector_ND = vector_ND.to(self.centroid_MJW)
        square_MJ = self.centroid_MJW.square().sum(2)
        rows = max(1, _CHUNK_NUMBERS // square_MJ.numel())
        codes = [torch.empty(0, self.num_bytes, dtype=torch.uint8, device=vector_ND.device)]
        for part_ND in torch.split(vector_ND, rows):
            rotated_ND = part_ND if self.rotation_DD is None else part_ND @ self.rotation_DD.t()
            rotated_ND = rotated_ND if self.offset_D is None else rotated_ND + self.offset_D
            part_MNW = rotated_ND.reshape(len(rotated_ND), self.num_bytes, -1).transpose(0, 1)
            distance_MNJ = torch.baddbmm(square_MJ[:, None], part_MNW, self.centroid_MJW.transpose(1, 2), alpha=-2)
            codes.append(distance_MNJ.argmin(2).t().to(torch.uint8))
        return torch.cat(codes)

    def decode(self, code_NM: Tensor) -> Tensor:
        """The vectors that codes stand for, (N, D), in the centroids' type."""
        place_M = torch.arange(self.num_bytes, device=code_NM.device) * self.centroid_MJW.shape[1]
        rows_NM = code_NM.long() + place_M
        rotated_ND = self.centroid_MJW.flatten(0, 1).index_select(0, rows_NM.flatten()).view(len(code_NM), self.dim)
        if self.offset_D is not None:
            rotated_ND = rotated_ND - self.offset_D
        return rotated_ND if self.rotation_DD is None else rotated_ND @ self.rotation_DD

    def relative_error(self, vector_ND: Tensor) -> float:
        """Mean over the vectors of |x - decode(encode(x))|^2 / |x|^2; vectors of length 0 do not count."""
        vector_ND = vector_ND.to(self.centroid_MJW)
        lost_N = (vector_ND - self.decode(self.encode(vector_ND))).double().square().sum(1)
        square_N = vector_ND.double().square().sum(1)
        counts_N = square_N > 0
        return float((lost_N[counts_N] / square_N[counts_N]).mean()) if bool(counts_N.any()) else 0.0

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ProductQuantizer:
        """The same on another device or of another type."""
        parts = (self.centroid_MJW, self.rotation_DD, self.offset_D)
        return ProductQuantizer(*(None if part is None else part.to(device=device, dtype=dtype) for part in parts))  # type: ignore[arg-type]

    @property
    def digest(self) -> str:
        """Identity of its content, which codes belong to."""
        content = hashlib.sha256()
        for name, value in self._tensors().items():
            content.update(f"{name} {tuple(value.shape)}".encode() + value.cpu().float().numpy().tobytes())
        return content.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        named = {"centroids": self.centroid_MJW, "rotation": self.rotation_DD, "offset": self.offset_D}
        return {name: value.detach().contiguous() for name, value in named.items() if value is not None}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, which appears whole or not at all.

        Args:
            metadata: more to keep, such as the digest of the store that it was trained on.
        """
        from safetensors.torch import save_file

        tensors = {name: value.cpu().float() for name, value in self._tensors().items()}
        said = {**(metadata or {}), "format": FORMAT, "digest": self.digest}
        with replacing(path) as aside:
            save_file(tensors, aside, metadata=said | {_SEAL: _digest_of(said)})
            sort_metadata(Path(aside))
            with open(aside, "rb") as file:
                os.fsync(file.fileno())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[ProductQuantizer, dict[str, str]]:
        """A saved quantizer and the metadata it was saved with.

        Raises: ValueError naming the file when it is damaged or something else; OSError when it cannot be read.
        """
        file = read_tensor_file(Path(path), "product quantizer")
        given = dict(file.metadata)
        shapes = {name: entry.shape for name, entry in file.entries.items()}
        wrong = {entry.dtype for entry in file.entries.values()} - {"F32"} or shapes.keys() - {
            "centroids",
            "rotation",
            "offset",
        }
        seal, said = given.pop(_SEAL, None), dict(given)
        kind = given.pop("format", None)
        if kind not in (FORMAT, _BEFORE) or wrong or len(shapes.get("centroids", ())) != 3:
            raise ValueError(f"{path} is no product quantizer of this release; name another file, or train it again")
        arrays: dict[str, Any] = {
            name: torch.from_numpy(np.array(file.bytes_of(name)).view(np.float32).reshape(shapes[name]))
            for name in shapes
        }
        try:
            codec = cls(arrays["centroids"], arrays.get("rotation"), arrays.get("offset"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); {DAMAGED}") from None
        if given.pop("digest", None) != codec.digest or (kind == FORMAT or seal) and seal != _digest_of(said):
            raise ValueError(f"{path} is damaged: its digest differs from its content; {DAMAGED}")
        return codec, given


def _digest_of(said: Mapping[str, str]) -> str:
    """Of what a file says about its codec, whose own digest is part of it."""
    return hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode()).hexdigest()

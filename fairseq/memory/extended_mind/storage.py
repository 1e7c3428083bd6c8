"""Memories in a file: safetensors, with what the memories are in its metadata. Read, they stay on disk until used.

Also memories that are being made, in memory or in files.

Shapes: G key-value heads, S memories, N of them, D width of a head.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.settings import POSITIONS
from fairseq.runtime.atomic_files import naming, replacing
from fairseq.runtime.files import locked

_RESERVED = 8 << 20

FORMAT = "fairseq-memory extended mind 1"


def save_memory(memory: Memory, path: str | Path) -> None:
    """Write a memory; the file appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"tokens": memory.token_N, "places": memory.place_S}
    for number, layer in memory.layers.items():
        tensors |= {f"layers.{number}.keys": layer.key_GSD, f"layers.{number}.values": layer.value_GSD}
    description = {
        "model_digest": memory.model_digest,
        "positions": memory.positions,
        "reach": memory.reach,
        "document_starts": memory.document_starts,
        "layers": list(memory.layers),
    }
    with locked(Path(f"{path}.lock"), f"memory {str(path)!r}"), replacing(path) as aside:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            aside,
            metadata={"format": FORMAT, "memory": json.dumps(description)},
        )
        with open(aside, "rb") as file:
            os.fsync(file.fileno())


def load_memory(path: str | Path) -> Memory:
    """Open a memory; its keys and values are mapped, not read.

    Raises: ValueError naming the file when it is missing, damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"no memory at {str(path)!r}; write one with save_memory")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no memory: its format is {metadata.get('format')!r}, not {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        description: dict[str, Any] = json.loads(metadata["memory"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); save the memory again") from None
    if description["positions"] not in POSITIONS:
        raise ValueError(f"{path} has positions {description['positions']!r}; known: {', '.join(POSITIONS)}")
    return Memory(
        layers={
            number: LayerMemory(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"])
            for number in description["layers"]
        },
        token_N=tensors["tokens"],
        place_S=tensors["places"],
        document_starts=tuple(description["document_starts"]),
        model_digest=description["model_digest"],
        positions=description["positions"],
        reach=description["reach"],
    )


class LayerStore:
    """Keys and values of a number of memories that is known, filled layer by layer from the front."""

    def __init__(self, size: int, device: torch.device | str, folder: str | None = None) -> None:
        """They are on a device, or in files of a folder, mapped: one for each tensor, of its bytes in order."""
        self._size, self._device, self._folder = size, device, folder
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._filled: dict[tuple[int, str], int] = {}

    def put(self, layer: int, kind: str, x_GND: Tensor) -> None:
        """Append to a layer's ``keys`` or ``values``. Raises: OSError naming the file when the disk is full."""
        key = (layer, kind)
        if key not in self._tensors:
            self._tensors[key], self._filled[key] = self._made(f"{layer}.{kind}", x_GND), 0
        stop = self._filled[key] + x_GND.shape[1]
        self._tensors[key][:, self._filled[key] : stop] = x_GND
        self._filled[key] = stop

    def layers(self) -> dict[int, LayerMemory]:
        """All of them, once they are whole."""
        assert set(self._filled.values()) == {self._size}, (self._size, self._filled)
        numbers = sorted({layer for layer, _ in self._tensors})
        return {n: LayerMemory(self._tensors[n, "keys"], self._tensors[n, "values"]) for n in numbers}

    def _made(self, name: str, like_GND: Tensor) -> Tensor:
        shape = (like_GND.shape[0], self._size, like_GND.shape[2])
        if self._folder is None:
            return torch.empty(shape, dtype=like_GND.dtype, device=self._device)
        count = shape[0] * shape[1] * shape[2]
        path = os.path.join(self._folder, name)
        with naming(path), open(path, "wb") as file:
            # Written, not only lengthened: a mapped file with holes would end the process when the disk is full.
            for left in range(count * like_GND.element_size(), 0, -_RESERVED):
                file.write(bytes(min(left, _RESERVED)))
        return torch.from_file(path, shared=True, size=count, dtype=like_GND.dtype).view(shape)

"""Memories in a file: safetensors, with what the memories are in its metadata. Read, they stay on disk until used.

Also memories that are being made, in memory or in files.

Shapes: G key-value heads, S memories, N of them, D width of a head.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.settings import POSITIONS
from fairseq.runtime.atomic_files import naming, replacing
from fairseq.runtime.files import locked, parse_json
from fairseq.runtime.records import CRC, TEXT, WHOLE, Entries, Fields, Items, Nullable, one_of, require
from fairseq.runtime.tensor_files import TensorFile, block_sums, read_tensor_file, sort_metadata

_RESERVED = 8 << 20
_WAY_OUT = "copy it again, or save the memory again"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_READ_WHOLE = frozenset({"tokens", "places"})
_DESCRIPTION = Fields(
    {
        "model_digest": Nullable(TEXT),
        "positions": one_of(*POSITIONS),
        "reach": WHOLE,
        "document_starts": Items(WHOLE),
        "layers": Items(WHOLE),
    }
)

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
    text = json.dumps(description)
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with locked(Path(f"{path}.lock"), f"memory {str(path)!r}"), replacing(path) as aside:
        save_file(
            held,
            aside,
            metadata={
                "format": FORMAT,
                "memory": text,
                "memory_crc": _crc(text),
                "checksums": json.dumps({name: _sums_of(tensor) for name, tensor in held.items()}),
            },
        )
        sort_metadata(Path(aside))
        with open(aside, "rb") as file:
            os.fsync(file.fileno())


def load_memory(path: str | Path) -> Memory:
    """Open a memory; its keys and values are mapped, not read.

    Raises: ValueError naming the file when it is missing, damaged or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    file, description = read_memory_header(path)
    for name in file.damaged(_checksums(file, small=True)):
        raise ValueError(f"{path} is damaged: its array {name!r} differs from what was saved; {_WAY_OUT}")
    try:
        with safe_open(path, framework="pt") as held:
            tensors = {name: held.get_tensor(name) for name in file.entries}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); {_WAY_OUT}") from None
    token_N, place_S = tensors["tokens"], tensors["places"]
    if len(place_S) and not 0 <= int(place_S.min()) <= int(place_S.max()) < len(token_N):
        raise ValueError(f"{path} is damaged: its places are not among its {len(token_N)} tokens; {_WAY_OUT}")
    return Memory(
        layers={
            number: LayerMemory(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"])
            for number in description["layers"]
        },
        token_N=token_N,
        place_S=place_S,
        document_starts=tuple(description["document_starts"]),
        model_digest=description["model_digest"],
        positions=description["positions"],
        reach=description["reach"],
    )


def read_memory_header(path: str | Path) -> tuple[TensorFile, dict[str, Any]]:
    """The header of a memory file, and its description; every array has the shape that others give it.

    Raises: ValueError naming the file when it is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no memory at {str(path)!r}; write one with save_memory")
    file = read_tensor_file(path, "memory", _WAY_OUT)
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no memory: its format is {file.metadata.get('format')!r}, not {FORMAT!r}")
    text = file.metadata.get("memory", "null")
    description = parse_json(text, str(path), _WAY_OUT)
    require(description, _DESCRIPTION, str(path), _WAY_OUT)
    if file.metadata.get("memory_crc") not in (None, _crc(text)):
        raise ValueError(f"{path} is damaged: its description differs from what was saved; {_WAY_OUT}")
    fault = _wrong_array(file, description["layers"])
    if fault is not None:
        raise ValueError(f"{path} is damaged: its array {fault} is missing or of another type or shape; {_WAY_OUT}")
    return file, description


def verify_memory(path: str | Path) -> bool:
    """Compare every array with its checksum; False for a memory of an earlier release, which has none.

    Raises: ValueError naming the file and the array that differs.
    """
    file, _ = read_memory_header(path)
    for name in file.damaged(_checksums(file, small=False)):
        raise ValueError(f"{path} is damaged: its array {name!r} differs from what was saved; {_WAY_OUT}")
    return "checksums" in file.metadata


def _checksums(file: TensorFile, *, small: bool) -> dict[str, list[str]]:
    """The checksums of all arrays, or of those that every reader reads whole; none in files of earlier releases."""
    sums = parse_json(file.metadata.get("checksums", "{}"), str(file.path), _WAY_OUT)
    require(sums, Entries(Items(CRC)), f"{file.path}: its checksums", _WAY_OUT)
    if sums and sums.keys() != file.entries.keys():
        raise ValueError(f"{file.path} is damaged: its checksums are of other arrays; {_WAY_OUT}")
    return {name: saved for name, saved in sums.items() if not small or name in _READ_WHOLE}


def _wrong_array(file: TensorFile, layers: Sequence[int]) -> str | None:
    """Name of the first array that the others contradict; None where all fit together."""
    entries = file.entries
    expected = {"tokens", "places"} | {f"layers.{n}.{kind}" for n in layers for kind in ("keys", "values")}
    if entries.keys() != expected:
        return repr(min(entries.keys() ^ expected))
    for name in _READ_WHOLE:
        if len(entries[name].shape) != 1 or entries[name].dtype not in ("I64", "I32"):
            return repr(name)
    for name in entries.keys() - _READ_WHOLE:
        entry = entries[name]
        if len(entry.shape) != 3 or entry.shape[1:2] != entries["places"].shape or entry.dtype not in _FLOATS:
            return repr(name)
        if entry.shape[:2] != entries[name.rpartition(".")[0] + ".keys"].shape[:2]:
            return repr(name)
    return None


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _sums_of(tensor: Tensor) -> list[str]:
    """A CRC-32 for each 4 MiB of a tensor's bytes."""
    return block_sums(tensor.reshape(-1).view(torch.uint8).numpy())


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

"""Memories in a file: safetensors, with what the memories are in its metadata. Read, they stay on disk until used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fairseq.disk import replacing
from fairseq.memory.extended_mind.cache import LayerMemory, Memory
from fairseq.memory.extended_mind.settings import POSITIONS

FORMAT = "fairseq-memory extended mind 1"


def save_memory(memory: Memory, path: str | Path) -> None:
    """Write a memory; the file appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"tokens": memory.token_N, "places": memory.place_S}
    for number, layer in memory.layers.items():
        tensors |= {f"layers.{number}.keys": layer.key_GSD, f"layers.{number}.values": layer.value_GSD}
    about = {
        "model_digest": memory.model_digest,
        "positions": memory.positions,
        "reach": memory.reach,
        "document_starts": memory.document_starts,
        "layers": list(memory.layers),
    }
    with replacing(path) as aside:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            aside,
            metadata={"format": FORMAT, "memory": json.dumps(about)},
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
        about: dict[str, Any] = json.loads(metadata["memory"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); save the memory again") from None
    if about["positions"] not in POSITIONS:
        raise ValueError(f"{path} has positions {about['positions']!r}; known: {', '.join(POSITIONS)}")
    return Memory(
        layers={
            number: LayerMemory(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"])
            for number in about["layers"]
        },
        token_N=tensors["tokens"],
        place_S=tensors["places"],
        document_starts=tuple(about["document_starts"]),
        model_digest=about["model_digest"],
        positions=about["positions"],
        reach=about["reach"],
    )

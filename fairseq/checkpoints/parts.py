"""Checkpoints in parts: every process writes what it holds of the spread tensors, and one file names the parts.

The file named as the checkpoint holds everything else, and for every spread tensor its place and shape. It is written
last, so that a name always stands for a whole state; parts that no checkpoint of the folder names are removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.checkpoints.integrity import require_intact
from fairseq.checkpoints.legacy import read_pickle
from fairseq.runtime.atomic_files import writing

FOLDER = "checkpoint_parts"
"""Folder beside the checkpoints; each state has a folder of its name in it."""
_PARTS = "parts"  # entry of the file that names the parts
_WAY_OUT = f"copy the folder {FOLDER} together with the checkpoint"


def write_part(folder: str, state: str, rank: int, tensors: list[Tensor]) -> None:
    """Write what one process holds, in the order of the spread tensors. Raises: OSError when it cannot be written."""
    path = _part(folder, state, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(str(path), binary=True) as file:
        torch.save({"state": state, "rank": rank, "tensors": tensors}, file)


def index_entry(state: str, world_size: int, places: list[list[Any]], shapes: list[list[int]]) -> dict[str, Any]:
    """What the file named as the checkpoint says of its parts.

    Args:
        places: keys that lead to each spread tensor in the checkpoint.
    """
    return {_PARTS: {"state": state, "world_size": world_size, "places": places, "shapes": shapes}}


def join_parts(path: str, content: Any, *, whole: bool) -> Any:
    """Put the spread tensors into a checkpoint that was read; a checkpoint without parts stays as it is.

    Args:
        whole: read the optimizer's state as well.
    Raises: ValueError naming the part that is missing, damaged or of another state.
    """
    if not isinstance(content, dict) or not isinstance(content.get(_PARTS), Mapping):
        return content
    index = content[_PARTS]
    needed = [whole or place[0] != "optimizer" for place in index["places"]]
    parts = [_read(path, index["state"], rank, needed) for rank in range(index["world_size"])]
    for number, (place, shape) in enumerate(zip(index["places"], index["shapes"])):
        if not needed[number]:
            continue
        tensor = torch.cat([part[number] for part in parts])
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"{path}: the parts of {place[-1]} make {list(tensor.shape)}, not {list(shape)}; {_WAY_OUT}"
            )
        _put(content, place, tensor)
    if not whole:
        content["optimizer"] = None
    return {key: value for key, value in content.items() if key != _PARTS}


def remove_unnamed(folder: str) -> None:
    """Remove the parts of states that no checkpoint of the folder names."""
    if not os.path.isdir(os.path.join(folder, FOLDER)):
        return
    named = {state for name in os.listdir(folder) if name.endswith(".pt") for state in _state_of(Path(folder, name))}
    for state in os.listdir(os.path.join(folder, FOLDER)):
        if state not in named:
            shutil.rmtree(os.path.join(folder, FOLDER, state), ignore_errors=True)


def split(content: Mapping[str, Any], local: Callable[[Tensor], Tensor | None]) -> tuple[Any, list[Any], list[Tensor]]:
    """Take the spread tensors out of nested values.

    Args:
        local: what this process holds of a spread tensor; None for any other.
    Returns: the values with None in their place, the places with their shapes, and what this process holds.
    """
    places: list[Any] = []
    held: list[Tensor] = []

    def walk(value: Any, place: list[Any]) -> Any:
        if isinstance(value, Tensor):
            own = local(value)
            if own is None:
                return value
            places.append((place, list(value.shape)))
            held.append(own)
            return None
        if isinstance(value, Mapping):
            return {key: walk(entry, [*place, key]) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(entry, [*place, number]) for number, entry in enumerate(value))
        return value

    return walk(content, []), places, held


def _part(folder: str | os.PathLike[str], state: str, rank: int) -> Path:
    return Path(folder) / FOLDER / state / f"part{rank}.pt"


def _read(path: str, state: str, rank: int, needed: list[bool]) -> list[Tensor]:
    """The tensors of a part, of which those that are needed are compared with their checksums."""
    part = _part(Path(path).parent, state, rank)
    if not part.exists():
        raise ValueError(f"{path} is in parts, and {part} is missing; {_WAY_OUT}")
    content = read_pickle(str(part))
    if not _is_part(content, len(needed)):
        raise ValueError(f"{part} is no part of a checkpoint with {len(needed)} spread tensors; {_WAY_OUT}")
    read = [tensor for tensor, used in zip(content["tensors"], needed) if used]
    require_intact(str(part), content | {"tensors": read}, whole=all(needed))
    if (content["state"], content["rank"]) != (state, rank):
        raise ValueError(
            f"{part} is part {content['rank']} of {content['state']}, not part {rank} of {state} as {path} says; "
            f"{_WAY_OUT}"
        )
    tensors: list[Tensor] = content["tensors"]
    return tensors


def _is_part(content: object, num_tensors: int) -> bool:
    """True if a file holds what ``write_part`` writes, of so many tensors."""
    if not isinstance(content, Mapping) or not {"state", "rank", "tensors"} <= content.keys():
        return False
    tensors = content["tensors"]
    is_whole = isinstance(tensors, list) and len(tensors) == num_tensors
    return is_whole and all(isinstance(tensor, Tensor) for tensor in tensors)


def _state_of(path: Path) -> list[str]:
    try:
        content = read_pickle(str(path))
    except (OSError, ValueError):
        return []
    index = content.get(_PARTS) if isinstance(content, Mapping) else None
    return [index["state"]] if isinstance(index, Mapping) else []


def _put(content: Any, place: list[Any], tensor: Tensor) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = tensor

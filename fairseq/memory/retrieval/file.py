"""The neighbours of every scored token of an evaluation, on disk: searched once, combined as often as one likes.

One file in the safetensors format (a length, a JSON header, the arrays), so that it maps into memory and other programs
read it. Its rows are the scored tokens in the order in which they were scored; its columns the neighbours as the search
ordered them, so that the first k are what a search for k finds. ``writer.py`` writes it.

Shapes: N scored tokens (or those of a part), K neighbours.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import as_tensor
from fairseq.memory.retrieval.schema import CHECKSUMS, PROGRESS, TEXT_SUMS, TYPES, WIDE
from fairseq.memory.types import Array, Candidates, LogSums
from fairseq.runtime.files import parse_json
from fairseq.runtime.records import OBJECT, read_record, require
from fairseq.runtime.tensor_files import TensorFile, read_tensor_file

if TYPE_CHECKING:
    from fairseq.memory.datastore.datastore import Datastore

FORMAT = "fairseq-memory retrieval"
FORMAT_VERSION = 1
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U16": np.dtype("<u2"),
    "BOOL": np.dtype("?"),
}
_WAY_OUT = "copy it again, or remove it and save it again (--save-retrieval)"


@dataclass(frozen=True)
class ArraySpec:
    """An array of the file."""

    name: str
    dtype: str
    """Its type, as safetensors calls it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of what belongs to one scored token."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


def specs_of(num_tokens: int, k: int, *, num_types: int, num_rows: int, text_sums: bool) -> tuple[ArraySpec, ...]:
    """The arrays of a file, large elements first so that each is aligned.

    Args:
        num_types: size of the dictionary, which decides the type of the neighbours' values.
        num_rows: rows of the datastore, which decide the type of the neighbours' ids.
        text_sums: whether the sums of memories of the text are kept.
    """
    id_type = "I32" if num_rows <= np.iinfo(np.int32).max else "I64"
    value_type = "U16" if num_types <= 1 + np.iinfo(np.uint16).max else "I32"
    wide = [ArraySpec("block", "I64", (num_tokens,))]
    wide += [ArraySpec("ids", id_type, (num_tokens, k))]
    names = ["lm_logp", "lm_norm", *(("near_hit", "near_whole") if text_sums else ())]
    wide += [ArraySpec("scores", "F32", (num_tokens, k)), ArraySpec("target", "I32", (num_tokens,))]
    wide += [ArraySpec(name, "F32", (num_tokens,)) for name in names]
    return (*wide, ArraySpec("values", value_type, (num_tokens, k)), ArraySpec("continues", "BOOL", (num_tokens,)))


@dataclass(frozen=True)
class SavedPart:
    """Saved results of some scored tokens; the neighbours are those of a search for K."""

    target_N: Tensor
    """int64."""
    lm_logp_N: Tensor
    """float32 ln p of the language model alone."""
    lm_norm_N: Tensor
    """float32 log-sum of the vocabulary's scores, as joint normalisation needs it."""
    text_sums: LogSums | None
    """Sums of the memories of the text; None without."""
    found: Candidates
    """The neighbours, scores before any temperature; values int32."""

    def nearest(self, k: int) -> Candidates:
        """The first k neighbours of each token, as a search for k finds them."""
        return self.found.nearest(k)


@dataclass(frozen=True)
class Retrieval:
    """An opened file; the arrays stay on disk and are read as they are used."""

    path: Path
    fingerprint: Mapping[str, Any]
    """Everything that decides its content: model, text, store, index, search."""
    about: Mapping[str, Any]
    """More about the evaluation that saved it: its settings, and where its files lay."""
    arrays: Mapping[str, Array]
    checksums: Mapping[str, list[str]] = field(repr=False)
    _file: TensorFile = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Retrieval:
        """Open a complete file. Raises: ValueError when it is missing, not complete, cut short or of another kind."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(_why_not_there(path))
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Retrieval:
        """Map a file, complete or not. Raises: ValueError when it is cut short or of another kind."""
        file = read_tensor_file(path, "file of --save-retrieval", _WAY_OUT)
        if file.metadata.get("format") != FORMAT:
            raise ValueError(_foreign(path))
        names = ("version", "made_of", "about", "checksums")
        content = {name: parse_json(file.metadata.get(name, ""), str(path), _WAY_OUT) for name in names}
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"{path}: format version {content['version']}; this release reads {FORMAT_VERSION}")
        _require_arrays(file, content["checksums"])
        for name in ("made_of", "about"):
            require(content[name], OBJECT, f"{path}: its {name}", _WAY_OUT)
        arrays: dict[str, Array] = {
            name: file.bytes_of(name).view(DTYPES[entry.dtype]).reshape(entry.shape)
            for name, entry in file.entries.items()
        }
        return cls(path, content["made_of"], content["about"], arrays, content["checksums"], file)

    def __len__(self) -> int:
        return len(self.arrays["target"])

    @property
    def k(self) -> int:
        """Neighbours saved per token."""
        return int(self.arrays["ids"].shape[1])

    @property
    def is_joint(self) -> bool:
        """True if vocabulary and memory were normalised together (TRIME); else they were interpolated (kNN-LM)."""
        return bool(self.fingerprint["joint"])

    @cached_property
    def order(self) -> Array:
        """The rows in the order of the text, int64."""
        return np.argsort(self.arrays["block"], kind="stable")

    def part(self, rows: slice) -> SavedPart:
        """Saved results of some rows, copied into memory."""
        arrays = {name: as_tensor(np.array(array[rows])) for name, array in self.arrays.items() if name != "ids"}
        text_sums = LogSums(arrays["near_hit"], arrays["near_whole"]) if "near_hit" in arrays else None
        scores_NK = arrays["scores"]
        keep_NK = scores_NK > -torch.inf
        found = Candidates(arrays["values"].to(torch.int32), scores_NK, keep_NK)
        return SavedPart(arrays["target"].long(), arrays["lm_logp"], arrays["lm_norm"], text_sums, found)

    def verify(self) -> None:
        """Compare every block with its checksum. Raises: ValueError naming the array that differs."""
        for name in self._file.damaged(self.checksums):
            raise ValueError(f"{self.path}: its array {name!r} is not as it was saved; {_WAY_OUT}")
        saved = self._file.metadata.get("description")
        if saved is not None and saved != description_sum(self._file.metadata):
            raise ValueError(f"{self.path} is damaged: its description differs from what was saved; {_WAY_OUT}")


def description_sum(metadata: Mapping[str, str]) -> str:
    """CRC-32 of the texts that say what a file was made of."""
    return f"{zlib.crc32(json.dumps([metadata['made_of'], metadata['about']]).encode()):08x}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Differences between two descriptions, with both values, as a clause of a message; empty when nothing does."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {_short(one.get(name))} and {_short(other.get(name))}" for name in names)


def store_digest(store: Datastore) -> str:
    """Identity of the store's content; for files of other programs a checksum of the values."""
    return store.digest or f"crc {zlib.crc32(np.asarray(store.values, np.int64).tobytes()):08x} of the values"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def progress_of(path: Path) -> Path:
    """The file that says how far an unfinished one has come."""
    return path.with_name(path.name + ".progress.json")


def _require_arrays(file: TensorFile, checksums: object) -> None:
    """Raise ValueError unless the arrays are those of :func:`specs_of` and each has its checksums."""
    way = f"{file.path}: its header"
    require(checksums, CHECKSUMS, way, _WAY_OUT)
    assert isinstance(checksums, dict)
    types = {**TYPES, **(TEXT_SUMS if TEXT_SUMS.keys() & file.entries.keys() else {})}
    if not types.keys() == file.entries.keys() == checksums.keys():
        wrong = sorted((types.keys() ^ file.entries.keys()) | (types.keys() ^ checksums.keys()))
        raise ValueError(f"{way} lacks or adds the array {wrong[0]!r} or its checksums: it is damaged; {_WAY_OUT}")
    wide, target = file.entries["ids"].shape, file.entries["target"].shape
    for name, entry in file.entries.items():
        shape = wide if name in WIDE else target
        if entry.dtype not in types[name] or entry.shape != shape or len(wide) != 2 or target != wide[:1]:
            raise ValueError(
                f"{way} says {entry.dtype} {entry.shape} of {name!r}, not {types[name][0]} {shape}: it is damaged; "
                f"{_WAY_OUT}"
            )


def _foreign(path: Path) -> str:
    return f"{path} is no file of --save-retrieval: another kind of file, or damaged; name another, or {_WAY_OUT}"


def _why_not_there(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; name a file that --save-retrieval wrote"
    if progress_of(path).exists():
        state = read_record(progress_of(path), PROGRESS)
        of = f"{state['rows_done']} of {state['num_tokens']} tokens"
        return f"{path} is not complete ({of}); run the command that saves it again to resume"
    return (
        f"no file {path}; eval_lm.py --knnlm --save-retrieval {path} saves one, for translation generate.py --knnmt "
        f"--score-reference --save-retrieval {path}"
    )

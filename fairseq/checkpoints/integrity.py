"""The CRC-32 that ``torch.save`` keeps of every record of a checkpoint, compared with what the file holds now.

``torch.load`` does not compare them: a flipped bit in a weight would only show in the perplexity.
"""

from __future__ import annotations

import contextlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq.runtime.threads import run_in_threads

_WAY_OUT = "copy or download it again, or take an older one"
_NOT_READ = frozenset({"optimizer", "last_optimizer_state"})
"""Entries that evaluation never touches: twice the size of the model."""


def require_intact(path: str, content: object, *, whole: bool = False) -> None:
    """Compare the records of a checkpoint that was opened, mapped, with their checksums.

    Only the tensors of ``content`` are read, and not those of the optimizer: at 1.5 GB/s for each thread, in pages that
    the model reads anyway. Files of the format before zip, and those without checksums, have nothing to compare.

    Args:
        content: what ``torch.load`` made of the file.
        whole: compare every record, that of the optimizer too.
    Raises: ValueError naming the file and the record.
    """
    with _archive(path) as archive:
        if archive is None or not has_checksums(archive):
            return
        if whole or _byte_order(archive) != sys.byteorder:
            _require_records(archive, archive.namelist())
            return
        _require_records(archive, [name for name in archive.namelist() if "/data/" not in name])
        known = {(entry.file_size, entry.CRC) for entry in archive.infolist()}
    kept = {k: v for k, v in content.items() if k not in _NOT_READ} if isinstance(content, Mapping) else content
    # A storage is a record. By its length and checksum: torch does not say which one.
    storages = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in _tensors(kept, "")}
    wrong: list[str] = []

    def compare(entry: tuple[str, Tensor]) -> None:
        name, tensor = entry
        data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        if (len(data), zlib.crc32(data.data)) not in known:
            wrong.append(name)

    run_in_threads(compare, list(storages.values()))
    if wrong:
        raise ValueError(f"{path} is damaged: {min(wrong)} differs from its checksum; {_WAY_OUT}")


def verify_archive(path: str) -> bool:
    """Compare every record of a checkpoint, or any zip archive, with its checksum; False when the file has none.

    Raises: ValueError naming the file and the record that differs.
    """
    with _archive(path) as archive:
        if archive is None or not has_checksums(archive):
            return False
        _require_records(archive, archive.namelist())
    return True


def has_checksums(archive: zipfile.ZipFile) -> bool:
    """False for a file written under ``torch.serialization.set_crc32_options(False)``: all are 0."""
    return any(entry.CRC for entry in archive.infolist())


@contextlib.contextmanager
def _archive(path: str) -> Iterator[zipfile.ZipFile | None]:
    """The file as a zip archive; None where it is none."""
    if not zipfile.is_zipfile(path):
        yield None
        return
    with _damage_in(path), zipfile.ZipFile(path) as archive:
        yield archive


@contextlib.contextmanager
def _damage_in(path: str) -> Iterator[None]:
    """Turn what zipfile raises for a damaged archive into a ValueError that names the file."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:160]}); {_WAY_OUT}") from None


def _require_records(archive: zipfile.ZipFile, names: list[str]) -> None:
    for name in names:
        with archive.open(name) as record:  # at its end zipfile compares the checksum
            while record.read(1 << 22):
                pass


def _byte_order(archive: zipfile.ZipFile) -> str:
    name = next((name for name in archive.namelist() if name.endswith("/byteorder")), None)
    return sys.byteorder if name is None else archive.read(name).decode("ascii", "replace")


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with a storage on the CPU, and its place in the file."""
    if isinstance(value, Tensor):
        if value.device.type == "cpu" and value.layout is torch.strided and value.untyped_storage().nbytes():
            yield where, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _tensors(entry, f"{where}.{name}" if where else str(name))
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _tensors(entry, f"{where}[{number}]")

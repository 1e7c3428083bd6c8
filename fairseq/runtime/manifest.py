"""The run manifest: a JSON file beside an output that records how the output was produced."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fairseq.runtime.atomic_files import write_atomically
from fairseq.runtime.files import read_json
from fairseq.runtime.hardware import INSTRUCTION_SETS, cpu_features, processor_name

logger = logging.getLogger(__name__)

_WHOLE_FILE_LIMIT = 1 << 30
_SAMPLED_BYTES = 1 << 20
_CHUNK_BYTES = 8 << 20  # a thread that shares the interpreter waits up to 5 ms for it after each
_DISTRIBUTIONS = ("fairseq-memory", "torch", "numpy", "faiss-cpu", "lightning")


@dataclass(frozen=True)
class Command:
    """A command line as the run manifest records it."""

    program: str
    """Name of the script, such as ``eval_lm.py``."""
    argv: tuple[str, ...]
    """Its arguments."""
    given: Mapping[str, Any]
    """Values of the flags the user gave, by field name; defaults are absent."""


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file; above 1 GiB, of its size and its first and last MiB (marked so)."""
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE_FILE_LIMIT:
            chunk = memoryview(bytearray(min(size, _CHUNK_BYTES) or 1))
            while count := file.readinto(chunk):
                digest.update(chunk[:count])
            return f"sha256:{digest.hexdigest()}"
        digest.update(str(size).encode())
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(-_SAMPLED_BYTES, os.SEEK_END)
        digest.update(file.read(_SAMPLED_BYTES))
    return f"sha256-of-size-and-ends:{digest.hexdigest()}"


def begin_digests(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Take digests of a run's inputs in the background, for :func:`write_manifest` of this process.

    To be called before PyTorch is imported, which takes one core longer than 1 GB of files takes another. What cannot
    be read is passed over.
    """
    begun = []
    for path in paths:
        with contextlib.suppress(OSError):
            key, future = _state(path), Future[str]()
            _DIGESTS[key] = future
            begun.append((path, key, future))
    threading.Thread(target=_take_digests, args=(begun,), daemon=True).start()


_DIGESTS: dict[tuple[str, int, int, int], Future[str]] = {}
if hasattr(os, "register_at_fork"):  # a forked process does not have the thread that takes them
    os.register_at_fork(after_in_child=_DIGESTS.clear)


def _state(path: str | os.PathLike[str]) -> tuple[str, int, int, int]:
    """What changes where a file is replaced or written."""
    status = os.stat(path)
    return os.path.abspath(path), status.st_ino, status.st_size, status.st_mtime_ns


def _take_digests(begun: list[tuple[str | os.PathLike[str], tuple[str, int, int, int], Future[str]]]) -> None:
    for path, key, future in begun:
        digest = ""
        try:
            digest = file_digest(path)
            digest = digest if _state(path) == key else ""
        except OSError as error:
            logger.debug("%s cannot be read yet: %s", path, error)
        finally:  # somebody waits for it
            future.set_result(digest)


def _input_digest(path: str | os.PathLike[str]) -> str:
    """:func:`file_digest`, or what :func:`begin_digests` has found for the same file."""
    begun = _DIGESTS.get(_state(path))
    return (begun.result() if begun is not None else "") or file_digest(path)


def write_manifest(
    path: str | os.PathLike[str],
    *,
    program: str,
    argv: Iterable[str],
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    inputs: Iterable[str | os.PathLike[str]] = (),
    seed: int | None = None,
) -> None:
    """Write the settings, inputs and results of a run.

    Args:
        path: the JSON file, usually ``<output>.run.json``.
        config: the settings in effect, as plain types.
        figures: results of the run.
        inputs: files that the run read; each is recorded with its size and digest.
    """
    record = {
        "command": shlex.join([program, *argv]),
        "config": config,
        "seed": seed,
        "figures": figures,
        "inputs": {str(i): {"bytes": os.path.getsize(i), "digest": _input_digest(i)} for i in inputs},
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": _commit(),
        "hardware": hardware_facts(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_atomically(path, json.dumps(record, indent=1, default=str) + "\n")
    logger.info("run manifest: %s", path)


def is_manifest_of(path: str | os.PathLike[str], command: str) -> bool:
    """True if a file is the run manifest of a command; False for anything else, also where there is none.

    Args:
        command: its first words, such as ``fairseq-datastore quantize``.
    """
    try:
        return str(read_json(Path(path)).get("command")).startswith(f"{command} ")
    except (ValueError, OSError):
        return False


def require_own_manifest(path: str | os.PathLike[str], command: str, flag: str) -> None:
    """Raise ValueError where a file that another command wrote has the name of this command's run manifest.

    Args:
        command: as of :func:`is_manifest_of`.
        flag: what gives the manifest another name.
    """
    if os.path.lexists(path) and not is_manifest_of(path, command):
        raise ValueError(f"{path} is there and no {command} wrote it; give another {flag}, or move it away")


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.stdout.strip() or None


def hardware_facts() -> dict[str, Any]:
    """Processor, its instruction sets, cores and memory, and where PyTorch is loaded its threads and GPUs."""
    features = cpu_features()
    hardware: dict[str, Any] = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "instructions": [name for name in INSTRUCTION_SETS if name in features],
    }
    if hasattr(os, "sysconf"):
        hardware["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None:
        hardware["threads"] = torch.get_num_threads()
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware

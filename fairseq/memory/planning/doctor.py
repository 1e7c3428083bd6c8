"""What this machine has for memories: versions, processor, search paths, memory, disk, and what will be slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from fairseq.memory.index.ops import products
from fairseq.memory.planning.measure import disk_rates
from fairseq.runtime.hardware import total_ram_bytes
from fairseq.runtime.manifest import hardware_facts

_PACKAGES = ("fairseq-memory", "torch", "numpy", "faiss-cpu", "numba", "lightning", "transformers")
_PATHS = {
    torch.int8: "8-bit products with error bounds, the survivors in float32",
    torch.bfloat16: "bfloat16 products with error bounds, the survivors in float32",
    torch.float32: "float32 products",
}
_SMALL_DISK = 10e9  # bytes


def report(folder: Path) -> Iterator[str]:
    """The lines of a report, each as soon as it is known.

    Args:
        folder: whose disk is measured, by a file of 256 MB that is removed.
    Raises: OSError when the folder cannot be written to.
    """
    facts = hardware_facts()
    yield "versions: " + ", ".join([f"Python {platform.python_version()}", *map(_version, _PACKAGES)])
    yield (
        f"processor: {facts['processor']}, {facts['cores']} cores for this process, {torch.get_num_threads()} threads; "
        f"{', '.join(facts['instructions']) or 'no features listed'}"
    )
    yield f"memory: {total_ram_bytes() / 1e9:.1f} GB"
    yield "GPUs: " + (", ".join(facts.get("gpus") or ()) or "none that PyTorch sees")
    chosen, rates = products.chosen(), products.measured()
    told = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in sorted(rates.items(), key=lambda item: -item[1]))
    yield f"exact search: {_PATHS[chosen.dtype]} ({chosen.name})"
    forced = f"; {products.SETTING} takes {chosen.name}" if os.environ.get(products.SETTING) else ""
    yield f"products: measured once, thousand millions a second on one thread: {told}{forced}"
    lists = "8-bit products" if chosen.is_rounded else "faiss's loops"
    yield f"searches of lists, and making them: {lists}; tables of codes for a few queries"
    written, read = disk_rates(folder / f".doctor-{os.getpid()}")
    free = shutil.disk_usage(folder).free
    yield f"disk of {folder}: writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s, {free / 1e9:.1f} GB free"
    for reason in _slow(int(facts["cores"] or 1), free):
        yield f"slow: {reason}"


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def _slow(cores: int, free: int) -> Iterator[str]:
    if products.chosen().dtype is torch.float32:
        yield (
            "exact search and the making of lists have no fast 8-bit products here (AVX2, AVX-512 VNNI, AMX or ARM's "
            "dot products); an index pays at smaller stores than elsewhere"
        )
    if torch.get_num_threads() < cores:
        setting = os.environ.get("OMP_NUM_THREADS")
        yield f"{torch.get_num_threads()} of {cores} cores compute (OMP_NUM_THREADS is {setting or 'not set'})"
    if free < _SMALL_DISK:
        yield f"{free / 1e9:.1f} GB of disk hold {free // 2048:,} keys of width 1024 in float16"

"""Compiling all kernels before their first use, and reporting which of them are compiled."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODULES = (
    "fairseq.memory.index.ops.kernels",
    "fairseq.memory.index.ops.rounding_kernels",
    "fairseq.memory.index.kmeans.kernels",
    "fairseq.memory.index.candidates.best_kernels",
    "fairseq.memory.index.candidates.kernels",
    "fairseq.memory.index.exact.kernels",
    "fairseq.memory.index.exact.streamed_kernels",
    "fairseq.memory.index.lists.tie_kernels",
    "fairseq.memory.index.lists.decoding_kernels",
    "fairseq.memory.index.lists.large_k_kernels",
    "fairseq.memory.index.lists.bulk_kernels",
    "fairseq.memory.index.lists.adc_kernels",
    "fairseq.memory.index.lists.byte_table_kernels",
    "fairseq.memory.index.lists.byte_search_kernels",
    "fairseq.memory.index.lists.single_search_kernels",
    "fairseq.memory.index.lists.pq_rescoring_kernels",
    "fairseq.memory.extended_mind.kernels",
    "fairseq.memory.retomaton.kernels",
    "fairseq.memory.sources.float_kernels",
    "fairseq.memory.sources.log_sum_kernels",
    "fairseq.memory.retomaton.walk_kernels",
    "fairseq.memory.combiners.vocab_mixing_kernels",
    "fairseq.memory.gnn.kernels",
    "fairseq.memory.proof.overlap_kernels",
    "fairseq.data.bm25.kernels",
    "fairseq.generation.steps.attention_kernels",
    "fairseq.generation.steps.packed_kernels",
    "fairseq.generation.steps.split_kernels",
)
"""All modules of compiled kernels, those that others call first."""


@dataclass(frozen=True)
class KernelStatus:
    """How many kernels are on disk, and where."""

    compiled: int
    total: int
    folder: str
    """In quotes, as it is printed; nothing between them where the user has no home."""
    obstacle: str
    """Why compiled kernels are not kept; empty where they are."""


def status() -> KernelStatus:
    """Look which kernels are compiled for this CPU, source and versions of numba and Python."""
    from fairseq.memory.index.ops.kernel_cache import cache_folder, readable, why_not_kept

    on_disk = [kernel._cache.has(types, kernel.targetctx) for _, kernel, types in _kernels()]
    return KernelStatus(sum(on_disk), len(on_disk), readable(cache_folder() or ""), why_not_kept())


def warm(report: Callable[[str], object]) -> KernelStatus:
    """Compile every kernel for all types that it is called with, unless it is on disk.

    Args:
        report: gets a line for each, with the seconds it took.
    Raises: OSError where compiled kernels cannot be kept.
    """
    from fairseq.memory.index.ops.kernel_cache import KernelCache, what_to_do

    before = status()
    if before.obstacle and before.compiled < before.total:
        raise OSError(f"compiled kernels cannot be kept: {before.obstacle}; set NUMBA_CACHE_DIR to a folder for them")
    KernelCache.reporting = True
    try:
        for number, (name, kernel, types) in enumerate(_kernels(), 1):
            start, held = time.perf_counter(), kernel._cache.has(types, kernel.targetctx)
            misses = sum(kernel.stats.cache_misses.values())
            kernel.compile(types)  # or load, which finds a file of which no kernel can be made
            held = held and misses == sum(kernel.stats.cache_misses.values())
            done = "compiled before" if held else f"{time.perf_counter() - start:.1f}s"
            report(f"[{number}/{before.total}] {name}: {done}")
    finally:
        KernelCache.reporting = False
    after = status()
    if KernelCache.save_error is not None and after.compiled < after.total:
        kept = f"{after.compiled} of {after.total} compiled kernels are kept"
        raise OSError(f"{kept}: {what_to_do(KernelCache.save_error)}")
    return after


def _kernels() -> list[tuple[str, Any, Any]]:
    """Name, kernel and types of its arguments, for each that is called from Python."""
    for module in MODULES:
        importlib.import_module(module)
    from fairseq.memory.combiners.vocab_mixing_kernels import mix_nearest
    from fairseq.memory.index.exact.kernels import collector
    from fairseq.memory.index.lists import bulk_kernels
    from fairseq.memory.index.lists.adc_search import byte_sums
    from fairseq.memory.index.lists.byte_search_kernels import byte_search
    from fairseq.memory.index.ops.kernels import KERNELS
    from fairseq.memory.index.ops.product_kernels import multiply
    from fairseq.memory.index.ops.products import best_tiles
    from fairseq.memory.index.ops.tile_loop_kernels import FINE_SUFFIX

    for make in (multiply, collector, bulk_kernels.sampler, bulk_kernels.collector):
        make(best_tiles())
    for make in (multiply, collector):
        make(best_tiles() + FINE_SUFFIX)
    if byte_sums():
        byte_search(byte_sums())
    for name in {"", byte_sums()}:
        mix_nearest(name)
    from fairseq.memory.index.ops.numba_library import sigutils

    return [
        (name, kernel, sigutils.normalize_signature(signature)[0])
        for name, (kernel, signatures) in KERNELS.items()
        for signature in signatures
    ]

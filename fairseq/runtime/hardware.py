"""Facts about the machine: its memory, and the matrix products that its CPU computes fast.

No other module queries CPU features, so that tests can simulate any CPU by replacing ``fast_products``.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""Features that decide how fast a CPU searches."""


def total_ram_bytes() -> int:
    """The machine's memory in bytes; 0 where the system does not report it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


@functools.cache
def fast_products() -> torch.dtype:
    """The narrowest type whose products the CPU computes faster than those of float32, or float32.

    Read from CPU features, not measured: the choice of a path must not depend on timing.
    """
    import torch

    if not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(cpu_features()) and hasattr(torch, "_int_mm"):
        return torch.int8
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def has_fast_int8() -> bool:
    """True if the CPU multiplies 8-bit integers faster than floats."""
    import torch

    return fast_products() is torch.int8


def cpu_features() -> set[str]:
    """Features that the CPU reports; none where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(file.read().split())
    except OSError:
        return set()

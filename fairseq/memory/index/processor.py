"""What products the processor is fast at. Nothing else asks, so that tests can answer for any processor here.

They replace ``fast_products``: ask ``processor.fast_products()``, or ``has_fast_int8``, which does.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def fast_products() -> torch.dtype:
    """The narrowest type whose products are faster than those of float32, or that.

    Not measured: timing must not decide which way is taken.
    """
    if not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(_flags()) and hasattr(torch, "_int_mm"):
        return torch.int8
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def has_fast_int8() -> bool:
    """Whether the processor multiplies 8-bit integers faster than floats."""
    return fast_products() is torch.int8


def _flags() -> set[str]:
    """What the processor says it can do, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(file.read().split())
    except OSError:
        return set()

"""Facts about the machine: memory and what its CPU computes fast."""

from __future__ import annotations

import os


def memory_bytes() -> int:
    """The machine's memory; 0 where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0

"""Facts about the machine: its memory, its CPU and what that can do. No other module queries CPU features."""

from __future__ import annotations

import ctypes
import os
import platform

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""Features that decide how fast a CPU searches."""

# linux/arch/x86/include/uapi/asm/prctl.h: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def total_ram_bytes() -> int:
    """The machine's memory in bytes; 0 where the system does not report it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def fits_in_ram(num_bytes: int) -> bool:
    """True if a file takes at most half of the RAM, so that the page cache holds it from one pass to the next."""
    return num_bytes <= total_ram_bytes() // 2


def has_bfloat16_products() -> bool:
    """True if the CPU has instructions that multiply bfloat16."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def may_use_matrix_registers() -> bool:
    """True if the system lets this process use AMX's registers, for which it has to be asked (Linux from 5.16 on).

    It refuses where a signal handler's stack is too small to save them. What is forked has the permission as well.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    given = tuple(ctypes.c_long(number) for number in (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))
    return bool(system_call(*given) == 0)


def cpu_features() -> set[str]:
    """Features that the CPU reports; none where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(file.read().split())
    except OSError:
        return set()


def processor_name() -> str:
    """The CPU's model; an empty string where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()

"""The ways to multiply many rows on this processor, and the fastest of them, found by measuring once.

Rounded to 8 bits, products take a third (AVX2) to a quarter (VNNI) of the time that they take in float32. Which way is
the fastest depends on the processor and on the libraries, so that each is timed: once for a machine, kept beside the
compiled kernels. ``FAIRSEQ_PRODUCTS=NAME`` takes one by its name. Whatever is taken, searches return the same bits,
unless keys are equally near up to float32's rounding.

Shapes: Q rows, M keys, E columns.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.types import Array
from fairseq.runtime import hardware
from fairseq.runtime.atomic_files import write_atomically

logger = logging.getLogger(__name__)

SETTING = "FAIRSEQ_PRODUCTS"
_LIBRARY_INT8, _BFLOAT16, _FLOAT32 = "library_int8", "bfloat16", "float32"
# Of a bulk of exact search. Rounding, and scoring again what is left, takes a sixth more than the products alone.
_ROWS, _KEYS, _COLUMNS = 96, 1024, 512
_ROUNDING_PAYS = 1.2
_PARTS_WIDTH = 2048  # 127 * 127 * 64 * 2048 and 2 * 127 * 64 * 2048 are below 2^31 together
_REPEATS = 5


@dataclass(frozen=True)
class Products:
    """A way to multiply rows with keys."""

    name: str
    """That of an instruction set whose tiles are written down here, or of the type that the library multiplies."""
    dtype: torch.dtype
    """Of the factors."""
    levels: int = 0
    """Largest size of a rounded entry."""
    zero: int = 0
    """What is added to the entries of rows."""
    tile_rows: int = 0
    """Rows that are multiplied at a time; 0 where the library decides that."""
    column_step: int = 8
    """Columns of factors are a multiple of it if they are rounded."""
    is_interleaved: bool = False
    """Keys are laid out as ``tile_loop_kernels`` has them."""
    is_fine: bool = False
    """Rounded entries take two bytes, as there: bounds are 30 to 60 times closer."""
    longest: float = 0.0
    """Largest length of a rounded vector; 0 where it does not matter."""
    cost: float = 1.0
    """Time of a product, in those of entries of 8 bits by the same instructions."""

    @property
    def is_rounded(self) -> bool:
        """Factors are integers."""
        return self.dtype is torch.int8

    @property
    def has_parts(self) -> bool:
        """Fine entries have two parts of 8 bits."""
        return self.is_fine and not self.longest

    @property
    def raw_dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.int32 if self.is_rounded else self.dtype

    def columns(self, width: int) -> int:
        """Columns of rows that are multiplied: the width, filled up if they are rounded, twice if they are fine."""
        step = self.column_step
        filled = max(step, -(-width // step) * step)
        return (2 * filled if self.is_fine else filled) if self.is_rounded else width

    def keys(self, key_B: Tensor, columns: int) -> Tensor:
        """Keys as ``multiply`` takes them, of the integers as ``is_interleaved`` has them."""
        return key_B if self.is_interleaved else key_B.view(-1, columns)

    def lay_out(self, quantized_ME: Tensor) -> tuple[Tensor, Array]:
        """Keys and what their products begin with, of rows with ``columns``: 64 of them or a multiple."""
        if not self.is_rounded:
            return quantized_ME, np.zeros(len(quantized_ME), np.int32)
        start_M = (quantized_ME.sum(1, dtype=torch.int32) * -self.zero).numpy()
        if not self.is_interleaved:
            return quantized_ME, start_M
        groups = quantized_ME.view(len(quantized_ME) // 16, 16, -1, 4)
        return groups.transpose(1, 2).reshape(-1), start_M

    def multiply(self, rows_QE: Tensor, keys: Tensor, start_M: Array, out_QM: Tensor) -> None:
        """Write the products of all rows with all keys."""
        if self.is_interleaved:
            from fairseq.memory.index.ops import product_kernels

            product_kernels.multiply(self.name)(rows_QE.numpy(), keys.numpy(), start_M, out_QM.numpy())
        else:
            (torch._int_mm if self.is_rounded else torch.mm)(rows_QE, keys.T, out=out_QM)


def by_name(name: str) -> Products:
    """A way to multiply. Raises: ValueError for a name that is none."""
    if name == _LIBRARY_INT8:
        return Products(name, torch.int8, 127)
    if name in (_BFLOAT16, _FLOAT32):
        return Products(name, getattr(torch, name))
    from fairseq.memory.index.ops.tile_loop_kernels import FINE, INSTRUCTIONS, LONGEST_WORDS

    if name not in INSTRUCTIONS:
        known = ", ".join((*INSTRUCTIONS, _LIBRARY_INT8, _BFLOAT16, _FLOAT32))
        raise ValueError(f"{name!r} is no way to multiply; these are: {known}")
    kind = INSTRUCTIONS[name]
    levels = kind.levels * FINE - 1 if kind.has_parts else kind.levels  # first parts are rounded as their shift says
    given = (torch.int8, levels, kind.zero, kind.rows, kind.column_step)
    longest = LONGEST_WORDS if kind.is_wide else 0.0
    return Products(name, *given, is_interleaved=True, is_fine=kind.is_fine, longest=longest, cost=kind.cost)


def finer(products: Products, width: int) -> Products | None:
    """The same instructions for fine entries; None where there are none, or columns too many for sums of 32 bits."""
    from fairseq.memory.index.ops.tile_loop_kernels import FINE_SUFFIX

    if not products.is_interleaved or products.is_fine:
        return None
    fine = by_name(products.name + FINE_SUFFIX)
    return None if fine.has_parts and width > _PARTS_WIDTH else fine


def for_width(products: Products, width: int) -> Products:
    """These, or the same instructions for coarse entries where columns are too many for fine ones."""
    from fairseq.memory.index.ops.tile_loop_kernels import FINE_SUFFIX

    is_too_wide = products.has_parts and width > _PARTS_WIDTH
    return by_name(products.name.removesuffix(FINE_SUFFIX)) if is_too_wide else products


def available() -> list[str]:
    """Names of what this processor can do, the most promising instruction set first."""
    from fairseq.memory.index.ops.numba_library import compiler_features
    from fairseq.memory.index.ops.tile_loop_kernels import FINE_SUFFIX

    features, compiled = hardware.cpu_features(), compiler_features()
    names = [name for name, wanted in _TILES.items() if name in features and wanted <= compiled]
    if "amx_int8" in names and not hardware.may_use_matrix_registers():
        names.remove("amx_int8")
    if not features.isdisjoint(_LIBRARY_FEATURES) and hasattr(torch, "_int_mm"):
        names.append(_LIBRARY_INT8)
    if hardware.has_bfloat16_products():
        names.append(_BFLOAT16)
    fine = [name + FINE_SUFFIX for name in (*names, "plain") if name in _TILES or name == "plain"]
    return [*names, _FLOAT32, "plain", *fine]


def best_tiles() -> str:
    """The instruction set whose tiles promise most on this processor."""
    return next((name for name in available() if name in _TILES), "plain")


# What the compiler calls the instructions that the tiles consist of. Of ARM's it lists hardly any: tiles ask for these.
_TILES = {
    "amx_int8": {"amx-int8", "amx-tile", "avx512f"},
    "avx512_vnni": {"avx512vnni", "avx512f"},
    "avx_vnni": {"avxvnni"},
    "avx2": {"avx2"},
    "i8mm": {"neon"},
    "asimddp": {"neon"},
}
_LIBRARY_FEATURES = {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"}


def chosen() -> Products:
    """What products are computed by: the fastest way, or what FAIRSEQ_PRODUCTS names.

    Raises: ValueError where that is unknown, or this processor cannot do it.
    """
    return _chosen(os.environ.get(SETTING, ""))


def is_forced() -> bool:
    """True where FAIRSEQ_PRODUCTS names the products."""
    return bool(os.environ.get(SETTING))


@functools.cache
def _chosen(wanted: str) -> Products:
    if wanted:
        try:
            products = by_name(wanted)
        except ValueError as error:
            raise ValueError(f"{SETTING}: {error}") from None
        if wanted not in available():
            raise ValueError(
                f"{SETTING}={wanted}: this processor has no such products; it has {', '.join(available())}"
            )
        return products
    rates = measured()
    rounded = {name: rate for name, rate in rates.items() if by_name(name).is_rounded}
    floats = {name: rate for name, rate in rates.items() if name not in rounded}
    best = max(floats, key=lambda name: floats[name])
    if rounded:
        fastest = max(rounded, key=lambda name: rounded[name])
        best = fastest if rounded[fastest] >= _ROUNDING_PAYS * floats[best] else best
    return by_name(best)


def chosen_tiles() -> Products:
    """The tiles of an instruction set: those that are chosen, or the most promising ones; not for fine entries."""
    products = chosen()
    return products if products.is_interleaved and not products.is_fine else by_name(best_tiles())


def has_fast_int8() -> bool:
    """True if products of 8-bit integers are what is fastest here."""
    return chosen().is_rounded


def has_fast_library_int8() -> bool:
    """True if products of 8-bit integers are fastest, and the library multiplies them fast as well."""
    return has_fast_int8() and _LIBRARY_INT8 in available()


@functools.cache
def measured() -> dict[str, float]:
    """Products per second of one thread, by name: the best instruction set's tiles and the library's types."""
    names = [best_tiles(), *(name for name in available() if name in (_LIBRARY_INT8, _BFLOAT16, _FLOAT32))]
    path = _rates_file(names)
    kept = _read(path, names) if path else None
    if kept:
        return kept
    count = torch.get_num_threads()

    def rates() -> dict[str, float]:
        torch.set_num_threads(1)
        return {name: _rate(by_name(name)) for name in names}

    try:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(rates).result()
    finally:
        torch.set_num_threads(count)  # threads that start later inherit the latest setting
    if path:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found))
        except OSError as error:
            logger.debug("the rates of products are not kept: %s", error)
    return found


def _rate(products: Products) -> float:
    """Products per second on this thread."""
    generator = torch.Generator().manual_seed(0)
    draw: Callable[[int], Tensor] = lambda rows: torch.randint(-60, 61, (rows, _COLUMNS), generator=generator)  # noqa: E731
    keys, start_M = products.lay_out(draw(_KEYS).to(products.dtype))
    rows_QE, out_QM = draw(_ROWS).to(products.dtype), torch.empty(_ROWS, _KEYS, dtype=products.raw_dtype)
    best = math.inf
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        products.multiply(rows_QE, keys, start_M, out_QM)
        if not products.is_interleaved:  # its products are passed over in memory, those of tiles in registers
            out_QM.amax()
        best = min(best, time.perf_counter() - began)
    return _ROWS * _KEYS * _COLUMNS / best


def _rates_file(names: list[str]) -> Path | None:
    """Where the rates of this machine are kept; None where nothing is kept."""
    from fairseq.memory.index.ops import kernel_cache, tile_loop_kernels

    folder = kernel_cache.cache_folder()
    if folder is None or kernel_cache.why_not_kept():
        return None
    source = Path(tile_loop_kernels.__file__).read_bytes()
    parts = (hardware.processor_name(), platform.machine(), torch.__version__, *kernel_cache.COMPILER, *names)
    digest = hashlib.sha256(source + "\0".join(map(str, parts)).encode()).hexdigest()[:32]
    return folder / f"products-{digest}.json"


def _read(path: Path, names: list[str]) -> dict[str, float] | None:
    """Rates that were kept; None where there are none, or other things."""
    try:
        rates = json.loads(path.read_text(encoding="ascii"))
        rates = {name: float(rates[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rates if all(0.0 < rate < math.inf for rate in rates.values()) else None

"""Rounded keys that exact search keeps in memory from its second bulk of queries on.

Shapes: N queries, M keys of a block, D width.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fairseq.memory.index.ops.bounded_scores import KeyBlock, Rounding
from fairseq.memory.index.ops.products import Products

SAMPLE = -1
"""The number of the block that is a sample of all keys."""
_WIDENING = 1.25


class KeptKeys:
    """Blocks of keys as they are multiplied, all rounded by the steps that one bulk of queries decided."""

    def __init__(self, rounding: Rounding) -> None:
        """Keep none yet."""
        self.rounding = rounding
        self._blocks: dict[int, KeyBlock] = {}

    def block(self, number: int) -> KeyBlock | None:
        """A block that is kept."""
        return self._blocks.get(number)

    def keep(self, number: int, block: KeyBlock) -> None:
        """Keep a block."""
        self._blocks[number] = block

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(block.memory.nbytes + block.about_5M.nbytes for block in list(self._blocks.values()))

    def suits(self, query_ND: Tensor) -> bool:
        """False if bounds would be closer by much with steps that these queries decide."""
        own_D, balance_D = query_ND.mean(0), self.rounding.balance_D
        own, kept = (
            torch.linalg.vector_norm((query_ND - centre_D) / balance_D, dim=1).median()
            for centre_D in (own_D, self.rounding.centre_D)
        )
        return bool(kept <= _WIDENING * own)


class Keeper:
    """Decides what an index keeps: the keys of the products with which two bulks in a row are searched."""

    def __init__(self, num_rows: int, limit_bytes: int) -> None:
        """Keep nothing of keys that would take more."""
        self._num_rows, self._limit = num_rows, limit_bytes
        self._lock = threading.Lock()
        self._latest: Products | None = None
        self._kept: KeptKeys | None = None

    def __reduce__(self) -> tuple[type[Keeper], tuple[int, int]]:
        """An index that is copied, or sent to another process, keeps keys of its own."""
        return Keeper, (self._num_rows, self._limit)

    def kept(self, products: Products, query_ND: Tensor) -> KeptKeys | None:
        """What is kept and suits these queries; None if nothing is."""
        with self._lock:
            kept = self._kept
        if kept is not None and kept.rounding.products == products and kept.suits(query_ND):
            return kept
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys that are kept."""
        with self._lock:
            return 0 if self._kept is None else self._kept.num_bytes

    def may_keep(self, products: Products, width: int) -> bool:
        """True if keys are rounded for these products and take little enough."""
        return products.is_rounded and self._num_rows * products.columns(width) <= self._limit

    def begin(self, rounding: Rounding) -> KeptKeys | None:
        """Keys that are to be kept from now on, rounded as those of this bulk; None if they are not."""
        products = rounding.products
        if not self.may_keep(products, rounding.width):
            return None
        with self._lock:
            is_second = products == self._latest
            self._latest = products
            if not is_second:
                return None
            self._kept = KeptKeys(rounding)
            return self._kept

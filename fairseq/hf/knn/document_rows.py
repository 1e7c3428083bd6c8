"""Rows of a datastore for documents that are added to it: keys by the model, and each document's place.

Shapes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.knn.batches import Batch, windows_of
from fairseq.memory.types import Array

_WINDOWS_AT_ONCE = 1
"""More would keep whoever waits between the steps of the iteration waiting longer, for nothing on a CPU."""


@dataclass(frozen=True)
class DocumentRows:
    """Some rows, in the order of the text."""

    key_ND: Tensor
    value_N: Tensor
    """int64: the tokens that came next."""


def document_rows(
    decoder: RowDecoder, documents: Sequence[Sequence[int]], kind: KeyType, window: int
) -> Iterator[DocumentRows]:
    """Read documents, a batch of windows in each step of the iteration; a row for each of their tokens but the first.

    Args:
        documents: token ids of each, two or more.
        window: tokens that the model reads at once; each is read with half a window before it, where there is that.
    """
    for ids in documents:
        windows = windows_of(ids, window, max(1, window // 2)) if len(ids) > window else windows_of(ids, window)
        for first in range(0, len(windows), _WINDOWS_AT_ONCE):
            batch = Batch.of_windows(windows[first : first + _WINDOWS_AT_ONCE])
            key_BTD = decoder.keys_of(batch.inputs(decoder.model), kind)
            yield DocumentRows(batch.scored(key_BTD), batch.targets)


def document_table(documents: Sequence[Sequence[int]]) -> Array:
    """First row, document and offset of each run of rows, int64 (documents, 3), as a datastore keeps them."""
    starts, table = 0, []
    for number, ids in enumerate(documents):
        table.append([starts, number, 1])
        starts += len(ids) - 1
    return np.array(table, np.int64)

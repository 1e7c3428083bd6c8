"""``fairseq.data.data_utils``: helpers of data sets.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.data import batching
from fairseq.data.indexed_dataset import MMapIndexedDataset


def collate_tokens(
    values: Sequence[Tensor],
    pad_idx: int,
    eos_idx: int | None = None,
    left_pad: bool = False,
    move_eos_to_beginning: bool = False,
    pad_to_length: int | None = None,
    pad_to_multiple: int = 1,
    pad_to_bsz: int | None = None,
) -> Tensor:
    """Rows of tokens as one padded tensor (B, T)."""
    width = max(max(len(row) for row in values), pad_to_length or 0)
    width = -(-width // pad_to_multiple) * pad_to_multiple
    found = values[0].new_full((max(len(values), pad_to_bsz or 0), width), pad_idx)
    for row, into in zip(values, found):
        if move_eos_to_beginning:
            first = row[-1:] if eos_idx is None else row.new_tensor([eos_idx])
            row = torch.cat([first, row[:-1]])
        into[width - len(row) :].copy_(row) if left_pad else into[: len(row)].copy_(row)
    return found


def load_indexed_dataset(
    path: str, dictionary: Any = None, dataset_impl: str | None = None, combine: bool = False, default: str = "mmap"
) -> Any:
    """The binarised text at a prefix, None when there is none; ``combine`` appends ``path1``, ``path2``, ...

    Raises: ValueError when it is damaged.
    """
    if not os.path.exists(path + ".idx"):
        return None
    if not combine or not os.path.exists(path + "1.idx"):
        return MMapIndexedDataset(path)
    parts, number = [MMapIndexedDataset(path)], 1
    while os.path.exists(f"{path}{number}.idx"):
        parts.append(MMapIndexedDataset(f"{path}{number}"))
        number += 1
    return torch.utils.data.ConcatDataset(parts)  # type: ignore[arg-type]


@contextlib.contextmanager
def numpy_seed(seed: int | None, *addl_seeds: int) -> Iterator[None]:
    """Within the block NumPy's global random numbers are those of the seeds; None changes nothing."""
    if seed is None:
        yield
        return
    state = np.random.get_state()
    np.random.seed(hash((seed, *addl_seeds)) % 1000000 if addl_seeds else seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def batch_by_size(
    indices: Iterable[int],
    num_tokens_fn: Any,
    num_tokens_vec: Any = None,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    fixed_shapes: Any = None,
) -> list[Any]:
    """Cut indices, in their order, into batches; see :func:`fairseq.data.batching.batch_by_size`.

    Raises: ValueError for fixed shapes, which are not offered, or a block above ``max_tokens``.
    """
    if fixed_shapes is not None:
        raise ValueError("batches of fixed shapes are not offered; leave out fixed_shapes")
    order = np.asarray(list(indices), dtype=np.int64)
    sizes = np.zeros(int(order.max(initial=-1)) + 1, dtype=np.int64)
    sizes[order] = num_tokens_vec if num_tokens_vec is not None else [num_tokens_fn(i) for i in order.tolist()]
    tokens, rows = (None if limit is None or limit < 0 else limit for limit in (max_tokens, max_sentences))
    return batching.batch_by_size(order, sizes, tokens, rows, required_batch_size_multiple)


def filter_by_size(indices: Iterable[int], dataset: Any, max_positions: int, raise_exception: bool = False) -> Any:
    """The indices of blocks of at most ``max_positions`` tokens. Raises: ValueError for others, if asked to."""
    kept, dropped = batching.filter_by_size(np.asarray(indices), np.asarray(dataset.sizes), max_positions)
    if raise_exception and len(dropped):
        raise ValueError(f"block {dropped[0]} has more than {max_positions} tokens; raise_exception=False drops it")
    return kept


def lengths_to_padding_mask(lens: Tensor) -> Tensor:
    """True where rows of these lengths are padded on the right, bool (B, T)."""
    return torch.arange(int(lens.max()), device=lens.device)[None] >= lens[:, None]


def post_process(sentence: str, symbol: str | None) -> str:
    """Join word pieces into words, for "@@ ", "sentencepiece" and "subword_nmt"."""
    from fairseq.data.dictionary import join_pieces

    return join_pieces(sentence, "@@ " if symbol == "subword_nmt" else symbol)

"""Batches for training with memory (arXiv 2205.12674, sec. 4.1): neighbours of some kind meet.

An order of all blocks is cut into batches like any other, so adjacent blocks share a batch. Epochs shuffle groups of
consecutive batches, never their content, and the ranks of one step hold the batches of whole groups.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq.data.batching_config import BatchingConfig
from fairseq.runtime.files import parse_json

logger = logging.getLogger(__name__)
Indices = npt.NDArray[np.int64]
_OTHER_DATA = {
    "block": "other text or another --tokens-per-sample: make it again (--output-segments-to-file",
    "sentence": "other text: make it again (--output-samples-to-file",
}


def training_order(config: BatchingConfig, num_blocks: int, unit: str = "block") -> Indices | None:
    """The order in which blocks are cut into batches; None for any order.

    Args:
        unit: what they are called in messages, ``block`` or ``sentence``.
    Raises: ValueError when --predefined-batches does not hold every block once.
    """
    if config.predefined_batches is not None:
        return read_order(config.predefined_batches, num_blocks, unit)
    return np.arange(num_blocks) if config.keep_order else None


def ranks_together(config: BatchingConfig, max_tokens: int | None, world_size: int) -> int:
    """Number of ranks that hold consecutive batches in a step, and so share a memory: ranks 0 to n-1, n to 2n-1, ...

    With --predefined-batches all ranks, with --keep-order one, unless --train-mem-size sets the number of tokens.
    Raises: ValueError when --train-mem-size is not a multiple of --max-tokens, or the ranks cannot be divided so.
    """
    memory = config.train_mem_size
    if memory is None:
        return world_size if config.predefined_batches is not None else 1
    if max_tokens is None:
        raise ValueError(f"--train-mem-size {memory} is measured in batches of --max-tokens; give --max-tokens")
    if memory % max_tokens:
        nearest = max(1, round(memory / max_tokens)) * max_tokens
        raise ValueError(
            f"--train-mem-size {memory} is not a multiple of --max-tokens {max_tokens}; give {nearest}, for example"
        )
    ranks = memory // max_tokens
    if ranks > world_size:
        logger.warning(
            "--train-mem-size %d is spread over %d processes, this run has %d: its memory holds %d tokens. Raise "
            "--max-tokens to %d for all of it",
            memory,
            ranks,
            world_size,
            world_size * max_tokens,
            memory // world_size,
        )
        return world_size
    if world_size % ranks:
        raise ValueError(
            f"--train-mem-size {memory} with --max-tokens {max_tokens} is shared by {ranks} processes at a time, which "
            f"does not divide {world_size} processes; run a multiple of {ranks}"
        )
    return ranks


def read_order(path: str | os.PathLike[str], num_blocks: int, unit: str = "block") -> Indices:
    """Read a JSON list that holds each of the numbers 0 to ``num_blocks - 1`` once.

    Raises: ValueError naming the blocks that are missing, repeated or unknown.
    """
    with open(path, "rb") as file:
        content = parse_json(file.read(), os.fspath(path), "write it with bm25_make_batches.py")
    order = _as_numbers(content, path, unit)
    if len(order) != num_blocks:
        raise ValueError(
            f"{os.fspath(path)} holds {len(order)} {unit}s, the training data has {num_blocks}; it belongs to "
            f"{_OTHER_DATA[unit]}, bm25_search.py, bm25_make_batches.py)"
        )
    outside = order[(order < 0) | (order >= num_blocks)]
    if len(outside):
        raise ValueError(
            f"{os.fspath(path)} holds {unit} {outside[0]}; the training data has 0 to {num_blocks - 1}; make it again"
        )
    times = np.bincount(order, minlength=num_blocks)
    if len(order) and times.max() > 1:
        repeated, missing = np.flatnonzero(times > 1), np.flatnonzero(times == 0)
        raise ValueError(
            f"{os.fspath(path)} holds {len(repeated)} {unit}s more than once ({_preview(repeated)}) and "
            f"{len(missing)} not at all ({_preview(missing)}); list every {unit} once"
        )
    return order


def _as_numbers(content: Any, path: str | os.PathLike[str], unit: str) -> Indices:
    if not isinstance(content, list):
        raise ValueError(
            f"{os.fspath(path)} holds a JSON {type(content).__name__}, expected a list of {unit} numbers; make it again"
        )
    wrong = [item for item in content if type(item) is not int]
    if wrong:
        raise ValueError(
            f"{os.fspath(path)} holds {len(wrong)} items that are not {unit} numbers, such as "
            f"{json.dumps(wrong[0])[:40]}; make it again"
        )
    try:
        return np.array(content, dtype=np.int64)
    except OverflowError:
        raise ValueError(
            f"{os.fspath(path)} holds {max(content, key=abs)}, which is not a {unit} number; make it again"
        ) from None


def _preview(numbers: Indices) -> str:
    return ", ".join(map(str, numbers[:3].tolist())) + (", ..." if len(numbers) > 3 else "")

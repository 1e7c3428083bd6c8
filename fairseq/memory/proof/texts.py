"""Texts as proofs need them: one with other tokens from a place on, and several as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def other_tokens(token_T: Tensor, first: int, num_types: int, random: np.random.Generator) -> Tensor:
    """As many tokens as given, int64 (T,), each of them another one.

    Args:
        first: number of the first type that is no special symbol.
        num_types: types of the dictionary, special symbols included.
    """
    size = max(2, num_types - first)
    shift_T = torch.from_numpy(random.integers(1, size, len(token_T))).to(token_T.device)
    return first + (token_T - first + shift_T) % size


def joined(texts: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Some texts one after the other, and where each begins; both int64. ``texts`` must not be empty."""
    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])[:-1]])
    return np.concatenate(texts).astype(np.int64), starts.astype(np.int64)

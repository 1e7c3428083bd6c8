"""What exploring any transformers model needs: its text in windows, and each token's place in them.

Shapes: N scored tokens, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.explorer.config import HfTextConfig
from fairseq.hf.knn.batches import Window, windows_of
from fairseq.hf.loading import context_length, load_decoder
from fairseq.memory.types import Array

_LARGEST_BLOCK = 1024  # where a model reads more, longer windows cost more than they gain
BATCH_SIZE = 8
"""Windows that are read side by side, as run_clm.py does by default."""


@dataclass(frozen=True)
class HfText:
    """A model, its tokenizer and the windows of a text."""

    model: Any
    tokenizer: Any
    windows: list[Window]
    group_W: Array
    """Group of lines that each window is of."""
    size: int
    """Tokens of a window."""
    title: str

    @classmethod
    def open(cls, config: HfTextConfig) -> HfText:
        """Load and cut, as run_clm.py does. Raises: ValueError for a model or a text that cannot be read."""
        try:
            model, tokenizer = load_decoder(str(config.model), "float32", config.device)
        except RuntimeError as error:  # no such device, or none of its kind
            raise ValueError(f"--device {config.device} cannot be used: {str(error).splitlines()[0]}") from None
        if tokenizer is None:
            raise ValueError(f"--model {config.model} has no tokenizer; copy its files beside the model's")
        size = _window_size(config.block_size, model, tokenizer)
        stride = config.stride or max(1, size // 2)
        if stride > size:
            raise ValueError(f"--stride {stride} is more than the window's {size} tokens: some would never be read")
        windows: list[Window] = []
        groups: list[int] = []
        for number, ids in enumerate(_groups(config, tokenizer)):
            cut = windows_of(ids, size, stride)
            windows += cut
            groups += [number] * len(cut)
        if not windows:
            raise ValueError(f"--text {config.text} has fewer than two tokens, so there is nothing to predict")
        return cls(model, tokenizer, windows, np.array(groups), size, str(config.text).rsplit("/", 1)[-1])

    def __len__(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def counts(self) -> Array:
        """int64 scored tokens of each window, (W,)."""
        return np.array([len(window.ids_T) - max(1, window.num_context) for window in self.windows])

    def columns(self) -> dict[str, Array]:
        """The columns of a table that are known before anything is scored."""
        tokens = [window.ids_T[max(1, window.num_context) :].numpy() for window in self.windows]
        group_N = np.repeat(self.group_W, self.counts)
        return {"token": np.concatenate(tokens), "block": group_N, "document": group_N}

    def place(self, at: int) -> tuple[Window, int]:
        """The window that scores a token, and the position in it that predicts the token."""
        ends = np.cumsum(self.counts)
        number = int(np.searchsorted(ends, at, side="right"))
        window = self.windows[number]
        before = int(ends[number] - self.counts[number])
        return window, max(1, window.num_context) + at - before - 1

    def encode(self, text: str) -> list[int]:
        """Tokens of a typed text, without special ones."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def with_beginning(self, tokens: list[int]) -> Tensor:
        """Typed tokens after the one that begins a text, int64 (1, T).

        Raises: ValueError where the tokenizer has none.
        """
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ValueError(
                "the tokenizer has no token that begins or ends a text, so that the first cannot be scored"
            )
        return torch.tensor([[int(first), *tokens]], device=self.model.device)


def _groups(config: HfTextConfig, tokenizer: Any) -> list[Tensor]:
    groups = []
    with open(str(config.text), encoding="utf-8") as lines:
        try:
            while group := list(itertools.islice(lines, config.lines_per_group)):
                ids = tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]
                groups.append(torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int64))
        except UnicodeDecodeError as error:
            raise not_utf8("--text", str(config.text), error) from error
    return groups


def not_utf8(flag: str, path: str, error: UnicodeDecodeError) -> ValueError:
    """What is wrong with a file that is no text."""
    return ValueError(f"{flag} {path} is not UTF-8 ({error.reason}); convert it with iconv")


def _window_size(given: int | None, model: Any, tokenizer: Any) -> int:
    """Tokens that the model reads at once. Raises: ValueError when the user wants more than it can."""
    most = int(context_length(model) or getattr(tokenizer, "model_max_length", None) or _LARGEST_BLOCK)
    if given is None:
        return min(most, _LARGEST_BLOCK)
    if given > most:
        raise ValueError(f"--block-size {given} is more than the model's {most} positions; give {most} or less")
    return given

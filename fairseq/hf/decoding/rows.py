"""Sequences that a model decodes side by side, a token of each in a step; others join and leave between steps.

Every sequence is read alone first; its key-value cache then joins those of the others, padded on the left.

Shapes: B sequences, T positions, L with scores, G key-value heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.capture import Capture
from fairseq.hf.hooks.inner_model import parameters_of
from fairseq.hf.hooks.key_value_cache import CACHE_NAMES, cache_of
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import find_tap


@dataclass(frozen=True)
class StepScores:
    """Output of a forward call: the model's own scores and the keys, of the positions that have scores."""

    logits_BLV: Tensor
    keys: Mapping[KeyType, Tensor]
    """(B, L, width) of each kind."""


@dataclass
class CachedRows:
    """The key-value cache of B sequences of different lengths, padded on the left."""

    cache: Any
    """Of transformers, whatever its class."""
    lengths: list[int]
    """Tokens of each sequence."""
    width: int
    """Tokens of the cache, padding included."""
    can_join: bool = field(default=False)
    """True if the caches of other sequences can be appended: each layer holds all tokens in one tensor."""

    def __len__(self) -> int:
        return len(self.lengths)

    def repeat(self, count: int) -> None:
        """Repeat the one sequence of the cache."""
        assert len(self) == 1, len(self)
        if count > 1:
            self.cache.batch_repeat_interleave(count)
            self.lengths = self.lengths * count

    def join(self, other: CachedRows) -> None:
        """Append the sequences of another cache, which must not be used any more."""
        assert self.can_join, "its layers cannot be padded"
        assert other.can_join, "its layers cannot be padded"
        width = max(self.width, other.width)
        for mine, its in zip(self.cache.layers, other.cache.layers):
            if mine.is_initialized:  # layers that share keys with others hold none
                mine.keys = torch.cat([_padded(mine.keys, width), _padded(its.keys, width)])
                mine.values = torch.cat([_padded(mine.values, width), _padded(its.values, width)])
        self.lengths, self.width = self.lengths + other.lengths, width

    def select(self, rows: Sequence[int]) -> None:
        """Keep some sequences, by number, and drop the padding that all of these have."""
        if len(rows) == len(self):
            return
        self.cache.batch_select_indices(torch.tensor(list(rows), dtype=torch.int64))
        self.lengths = [self.lengths[row] for row in rows]
        spare = self.width - max(self.lengths, default=0)
        if self.can_join and spare and rows:
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[..., spare:, :], layer.values[..., spare:, :]
            self.width -= spare

    def mask(self, device: torch.device) -> Tensor | None:
        """The attention mask of the next step, (B, width + 1); None where nothing is padded."""
        if all(length == self.width for length in self.lengths):
            return None
        start_B1 = torch.tensor([[self.width - length] for length in self.lengths], device=device)
        return (torch.arange(self.width + 1, device=device)[None] >= start_B1).long()


class RowDecoder:
    """Runs a model without its memories over prompts and single tokens, and hands out scores and keys."""

    def __init__(self, model: nn.Module, kinds: Sequence[KeyType]) -> None:
        """Tap the model; ``close`` lets go of it. ``kinds`` are those of the keys that are wanted."""
        self.model = model
        self._captures = {kind: Capture(find_tap(model, kind)) for kind in kinds}
        names = parameters_of(model)
        self._cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[1])
        self._has_positions, self._can_keep = "position_ids" in names, "logits_to_keep" in names

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Leave the model as it was."""
        for capture in self._captures.values():
            capture.remove()

    def read(self, ids: Sequence[int], *, all_positions: bool = False, **more: Any) -> tuple[CachedRows, StepScores]:
        """Read a prompt: its cache, and the scores of its last position or of all."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=self.device)}
        if self._can_keep and not all_positions:
            inputs["logits_to_keep"] = 1
        output, scores = self._call(inputs | more, None if all_positions else 1)
        cache = cache_of(output)
        layers = getattr(cache, "layers", None)
        can_join = layers is not None and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        return CachedRows(cache, [len(ids)], len(ids), can_join), scores

    def step(self, rows: CachedRows, tokens: Sequence[int], **more: Any) -> StepScores:
        """Append a token to each sequence, and return the scores after it."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor(list(tokens), device=self.device)[:, None]}
        inputs[self._cache_name] = rows.cache
        mask = rows.mask(self.device)
        if mask is not None:
            inputs["attention_mask"] = mask
            if self._has_positions:
                inputs["position_ids"] = torch.tensor(rows.lengths, device=self.device)[:, None]
        _, scores = self._call(inputs | more, 1)
        rows.lengths, rows.width = [length + 1 for length in rows.lengths], rows.width + 1
        return scores

    def keys_of(self, inputs: Mapping[str, Any], kind: KeyType) -> Tensor:
        """The keys of a call whose scores nobody wants, (B, T, width)."""
        few = {"logits_to_keep": 1} if self._can_keep and kind is not KeyType.final_hidden else {}
        for capture in self._captures.values():
            capture.clear()
        with torch.inference_mode():
            self.model(**inputs, **few)
        return self._captures[kind].take(len(inputs["input_ids"]))

    def _call(self, inputs: dict[str, Any], last: int | None) -> tuple[Any, StepScores]:
        for capture in self._captures.values():
            capture.clear()
        with torch.inference_mode():
            output = self.model(**inputs, use_cache=True, return_dict=True)
        count = len(inputs["input_ids"])
        keys = {kind: capture.take(count) for kind, capture in self._captures.items()}
        logits_BLV = output.logits
        if last is not None:
            logits_BLV, keys = logits_BLV[:, -last:], {kind: key_BTD[:, -last:] for kind, key_BTD in keys.items()}
        return output, StepScores(logits_BLV, keys)


def _padded(x_BGTD: Tensor, width: int) -> Tensor:
    return nn.functional.pad(x_BGTD, (0, 0, width - x_BGTD.shape[-2], 0))

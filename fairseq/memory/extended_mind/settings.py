"""Options for external memories, with a default for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

MEMORY_TYPES = ("manual", "exact", "faiss")
"""Searches for memories: our own kernels over memories in RAM, the streaming exact search (memories may stay
on disk), or a faiss index."""

POSITIONS = ("origin", "relative")
"""Positions of memories: all at the place before the local text (rotary keys unrotated, ALiBi distance from -1), which
is the paper's way, or one after the other before it, within half the model's context."""


@dataclass(frozen=True, kw_only=True)
class MindSettings:
    """Options for selecting and using memories."""

    topk: int = 10
    """Memories each query of each head attends to; 0 leaves the model as it is."""
    mask_by_sim: bool = False
    """Leave out chosen memories whose cosine similarity is not above ``sim_threshold``; others do not move up."""
    sim_threshold: float = 0.25
    """Cosine similarity that memories must exceed with ``mask_by_sim``."""
    use_external_mind: bool = True
    """Use memories at all."""
    use_external_mind_by_layer: tuple[bool, ...] | None = None
    """One switch per layer: use memories there; None for all layers."""
    memory_type: str = "manual"
    """One of ``MEMORY_TYPES``."""
    memory_device: str = "cpu"
    """Device on which memories are kept and searched: ``cpu``, ``cuda``, ...; ``model`` for that of the model."""
    tokenizer_all_special_ids: tuple[int, ...] | None = None
    """Tokens that ``remove_special_ids`` removes; None for those that the tokenizer or the model's config names."""
    remove_special_ids: bool = True
    """Remove memories of special tokens after the others have read them."""
    positions: str = "origin"
    """One of ``POSITIONS``."""
    stride: int = 512
    """Tokens by which the window moves on that reads a memory's text."""
    max_len: int = 3072
    """Longest window, in tokens; at most the model's context."""
    limit: int | None = 100_000
    """Most tokens of one memory; a longer one is rejected. None for no limit."""
    faiss_index: str = "Flat"
    """faiss factory string of the index over each head's keys."""
    faiss_probe: int = 8
    """Lists such an index probes, if it has lists."""

    def __post_init__(self) -> None:
        if not _is_whole(self.topk) or self.topk < 0:
            raise ValueError(f"topk is {self.topk!r}; it must be 0 (no memories) or a positive whole number")
        if self.memory_type not in MEMORY_TYPES:
            raise ValueError(f"unknown memory_type {self.memory_type!r}; known: {', '.join(MEMORY_TYPES)}")
        if self.positions not in POSITIONS:
            raise ValueError(f"unknown positions {self.positions!r}; known: {', '.join(POSITIONS)}")
        if not -1 <= self.sim_threshold <= 1:
            raise ValueError(f"sim_threshold {self.sim_threshold} is no cosine similarity; give one from -1 to 1")
        if self.stride < 1 or self.max_len < self.stride:
            raise ValueError(f"stride {self.stride} and max_len {self.max_len}: give 1 <= stride <= max_len")
        if self.faiss_probe < 1:
            raise ValueError(f"faiss_probe must be at least 1, got {self.faiss_probe}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit} allows no memory; give a positive number, or None for no limit")

    @classmethod
    def merged(cls, *mappings: Mapping[str, Any] | None) -> MindSettings:
        """Defaults, over which each mapping in turn sets what it has. Lists become tuples.

        Raises: ValueError naming an unknown key and the known ones.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for mapping in mappings:
            for name, value in (mapping or {}).items():
                # The original's documents call it so, its code the other way.
                name = "remove_special_ids" if name == "remove_special_tokens" else name
                if name not in known:
                    raise ValueError(f"unknown memory setting {name!r}; known: {', '.join(sorted(known))}")
                values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def with_changes(self, **changes: Any) -> MindSettings:
        """These settings with others for one call; a None changes nothing."""
        changes = {name: x for name, x in changes.items() if x is not None and x is not getattr(self, name, None)}
        return replace(self, **changes) if changes else self

    def uses(self, layer: int) -> bool:
        """True if a layer attends to memories."""
        by_layer = self.use_external_mind_by_layer
        return self.use_external_mind and self.topk > 0 and (by_layer is None or by_layer[layer])


def chosen_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[bool, ...] | None:
    """Layer numbers as one yes or no per layer; negative numbers count from the last.

    Raises: ValueError naming a number that is no layer's.
    """
    if layers is None:
        return None
    for layer in layers:
        if not _is_whole(layer) or not -num_layers <= layer < num_layers:
            raise ValueError(f"layers holds {layer!r}; the model has {num_layers} layers, 0 to {num_layers - 1}")
    chosen = {layer % num_layers for layer in layers}
    return tuple(layer in chosen for layer in range(num_layers))


def check_layers(by_layer: Sequence[bool] | None, num_layers: int) -> None:
    """Raise ValueError unless there is one switch per layer."""
    if by_layer is not None and len(by_layer) != num_layers:
        raise ValueError(
            f"use_external_mind_by_layer has {len(by_layer)} entries; the model has {num_layers} layers, give one each"
        )


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)

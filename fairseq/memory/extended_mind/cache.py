"""The memories of a model: keys and values of every layer, and which of the user's tokens each one is.

Shapes: G key-value heads, S memories, N tokens of the user's text, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerMemory:
    """The memories of one layer. With grouped-query attention there are fewer heads here than queries have."""

    key_GSD: Tensor
    value_GSD: Tensor

    def __post_init__(self) -> None:
        assert self.key_GSD.shape[:2] == self.value_GSD.shape[:2], (self.key_GSD.shape, self.value_GSD.shape)

    def __len__(self) -> int:
        return self.key_GSD.shape[1]

    def changed(self, change: Change) -> LayerMemory:
        """Both tensors, changed."""
        return LayerMemory(change(self.key_GSD), change(self.value_GSD))


@dataclass(frozen=True)
class Memory:
    """Memories of one text or several documents. It never changes; what would change it makes another one."""

    layers: Mapping[int, LayerMemory]
    """By number of the layer."""
    token_N: Tensor
    """int64, every token of the text, in order; special tokens too."""
    place_S: Tensor
    """int64, rising: which of the tokens each memory is."""
    document_starts: tuple[int, ...]
    """Number of the first token of each document; rising, the first is 0."""
    model_digest: str
    """Of the model that read the text."""
    positions: str
    """The positions of memories (see ``settings.POSITIONS``)."""
    reach: int = 0
    """With ``relative`` positions: the farthest a memory may stand before the local text."""

    def __post_init__(self) -> None:
        sizes = {len(layer) for layer in self.layers.values()} | {len(self.place_S)}
        assert len(sizes) == 1, sizes

    def __len__(self) -> int:
        return len(self.place_S)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for layer in self.layers.values() for x in (layer.key_GSD, layer.value_GSD))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Memory:
        """The same memories elsewhere or in another type."""
        return self._changed(lambda x_GSD: x_GSD.to(device=device, dtype=dtype))

    def only(self, keep_S: Tensor) -> Memory:
        """Those memories that ``keep_S`` (bool) keeps; the tokens stay."""
        kept = torch.nonzero(keep_S)[:, 0]
        return self._changed(lambda x_GSD: x_GSD.index_select(1, kept.to(x_GSD.device)), place_S=self.place_S[kept])

    def without_tokens(self, special: Sequence[int]) -> Memory:
        """Without the memories of these tokens, for good; others have read them already."""
        keep_S = ~torch.isin(self.token_N[self.place_S], torch.tensor(list(special), dtype=torch.int64))
        return self if bool(keep_S.all()) else self.only(keep_S)

    def followed_by(self, other: Memory) -> Memory:
        """Both, the other's documents after these.

        Raises: ValueError when they are of different models, or where memories stand relative to the last.
        """
        if self.model_digest != other.model_digest:
            raise ValueError(f"memories of model {self.model_digest} and of {other.model_digest} cannot be joined")
        if "relative" in (self.positions, other.positions):
            raise ValueError("memories with relative positions cannot be joined; build one of all the text instead")
        layers = {
            number: LayerMemory(
                torch.cat([mine.key_GSD, other.layers[number].key_GSD.to(mine.key_GSD)], 1),
                torch.cat([mine.value_GSD, other.layers[number].value_GSD.to(mine.value_GSD)], 1),
            )
            for number, mine in self.layers.items()
        }
        return replace(
            self,
            layers=layers,
            token_N=torch.cat([self.token_N, other.token_N]),
            place_S=torch.cat([self.place_S, other.place_S + len(self.token_N)]),
            document_starts=self.document_starts + tuple(s + len(self.token_N) for s in other.document_starts),
        )

    def where(self, token: int) -> tuple[int, int]:
        """Document of one of the user's tokens, and its place in it."""
        starts = torch.tensor(self.document_starts)
        document = int(torch.searchsorted(starts, token, right=True)) - 1
        return document, token - self.document_starts[document]

    def offsets(self) -> Tensor | None:
        """Distance of each memory from the place before the local text, (S,) int64, <= 0; None at origin."""
        if self.positions == "origin":
            return None
        return (self.place_S - (len(self.token_N) - 1)).clamp_(min=1 - self.reach)

    def _changed(self, change: Change, **others: Any) -> Memory:
        return replace(self, layers={number: layer.changed(change) for number, layer in self.layers.items()}, **others)

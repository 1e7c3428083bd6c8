"""The parts of transformers' objects that this package uses; for type checkers, so that nothing need be imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Numbers of the special tokens."""
        ...

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Token ids of a text, under ``input_ids``."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of some tokens."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Every token and its number."""
        ...


class KeyValueCache(Protocol):
    """The keys and values of the tokens a model has read."""

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        ...

    def update(self, key_BGTD: Tensor, value_BGTD: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns its keys and values so far."""
        ...

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of other beams."""
        ...


class ModelOutput(Protocol):
    """The output of a language model: a mapping whose items are attributes too."""

    logits: Tensor

    def keys(self) -> Iterable[str]:
        """Names of the items."""
        ...

    def __getitem__(self, name: str) -> Any: ...

    def get(self, name: str) -> Any:
        """An item, or None."""
        ...

    def to_tuple(self) -> tuple[Any, ...]:
        """The items without their names."""
        ...

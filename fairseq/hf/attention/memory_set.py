"""The memories of a model: set, added to, cleared, saved and loaded.

Shapes: B rows.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fairseq.hf.attention.attention_sites import find_sites
from fairseq.hf.attention.build import (
    MemorySource,
    TextTokens,
    build_memory,
    device_of,
    model_digest,
    special_ids,
    texts_in,
    token_documents,
)
from fairseq.hf.hooks.inner_model import check_is_loaded, inner_model
from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.lookup import LayerLookup
from fairseq.memory.extended_mind.settings import MindSettings, check_layers, chosen_layers
from fairseq.memory.extended_mind.storage import load_memory, save_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Memories = Memory | Sequence[Memory] | MemorySource
"""One memory for all rows, one for each row, or what a memory is built of."""


class MemorySet:
    """The memories that one model may attend to: none, one for all rows of a batch, or one for each row."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: Tokenizer | None = None,
        layers: Sequence[int] | None = None,
        config: Mapping[str, Any] | None = None,
        add_first_token: bool = True,
        **settings: object,
    ) -> None:
        """Find the attentions of the model; the arguments are those of ``ExtendedMind``."""
        model = cast("PreTrainedModel", inner_model(model))
        check_is_loaded(model)
        self.model, self.tokenizer, self.add_first_token = model, tokenizer, add_first_token
        self.settings = MindSettings.merged(config, settings)
        self.sites = find_sites(model)
        if layers is not None:
            by_layer = chosen_layers(layers, self.sites.num_layers)
            self.settings = self.settings.with_changes(use_external_mind_by_layer=by_layer)
        check_layers(self.settings.use_external_mind_by_layer, self.sites.num_layers)
        special_ids(model, tokenizer, self.settings)
        self.source: Memories | None = None
        """The source that was given last."""
        self._memories: tuple[Memory, ...] = ()
        self._are_texts: list[bool] = []
        self._waiting = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lookups: dict[tuple[int, int], LayerLookup] = {}

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories: none, one for all rows, or one per row of a batch."""
        return self._memories

    def set_memory(self, memory: Memories, **building: Any) -> None:
        """Replace the memories (see ``__init__``); ``building`` holds arguments of ``build_memory``."""
        self._check_may_change()
        given = _memories_in(memory)
        memories = given or [self._built(memory, **building)]  # type: ignore[arg-type]
        for each in memories:
            self._check(each)
        device = device_of(self.settings, self.model)
        memories = [each.to(device) for each in memories]
        if given and self.settings.memory_device == "disk":
            memories = self._on_disk(memories)
        self._memories, self.source, self._waiting = tuple(memories), memory, False
        # Documents whose first token was added, of the one memory that more of them may be appended to.
        self._are_texts = [False] * len(memories[0].document_starts) if given else texts_in(memory)  # type: ignore[arg-type]
        self._lookups.clear()

    def set_memory_later(self, source: MemorySource | None) -> None:
        """Replace the memories by ones that are built at the model's next call; None for none."""
        self.clear_memories()
        self.source, self._waiting = source, source is not None

    def add_memory(self, source: MemorySource, **building: Any) -> None:
        """Append documents to the memory that all rows share."""
        self._check_may_change()
        if len(self._memories) > 1:
            raise ValueError(f"there are {len(self._memories)} memories, one for each row; call set_memory instead")
        if not self._memories:
            self.set_memory(source, **building)
            return
        old = self._memories[0]
        documents, are_texts = token_documents(source, self.tokenizer), [*self._are_texts, *texts_in(source)]
        total, limit = len(old.token_N) + sum(map(len, documents)), self.settings.limit
        if limit is not None and total > limit:
            raise ValueError(f"a memory of {total} tokens is longer than the limit of {limit}; raise limit=")
        if old.positions == "relative":
            # All of them move when text is appended.
            starts = [*old.document_starts, len(old.token_N)]
            before = [old.token_N[start:stop] for start, stop in zip(starts, starts[1:])]
            are_texts = are_texts[-len(before) - len(documents) :]
            together = zip([*before, *documents], are_texts)
            tokenized: Any = [TextTokens(ids) if is_text else ids for ids, is_text in together]
            self.set_memory(tokenized, **building)
        else:
            self.set_memory(old.followed_by(self._built(source, **building)))
        self._are_texts = are_texts

    def clear_memories(self) -> None:
        """Remove all memories."""
        self._check_may_change()
        self._memories, self.source, self._waiting = (), None, False
        self._lookups.clear()

    def save_memory(self, path: str) -> None:
        """Write the memory to a safetensors file, atomically. Raises: ValueError unless there is exactly one."""
        if len(self._memories) != 1:
            raise ValueError(f"there are {len(self._memories)} memories; a file holds one: save each of .memories")
        save_memory(self._memories[0], path)

    def load_memory(self, path: str) -> None:
        """Replace the memories by that of a file, which stays on disk as far as the memory type allows."""
        self.set_memory(load_memory(path))

    def _lookup(self, memory: Memory, layer: int) -> LayerLookup:
        """The search in one layer of a memory, prepared at its first use."""
        key = (id(memory), layer)
        if key not in self._lookups:
            self._lookups[key] = LayerLookup(memory, layer, self.settings)
        return self._lookups[key]

    def _memories_of(self, rows: int, *, generating: bool) -> list[Memory]:
        """The memory of each row. While generating, beams of a sequence follow each other and share its memory."""
        count = len(self._memories)
        if count == 1:
            return [self._memories[0]] * rows
        if rows != count and not (generating and rows % count == 0):
            raise ValueError(f"a batch of {rows} rows and {count} memories; give one memory, or one for each row")
        return [self._memories[row * count // rows] for row in range(rows)]

    def _check_may_change(self) -> None:
        """Raise ValueError while the memories must stay as they are."""

    def _detached(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, the model reads without memories."""
        return contextlib.nullcontext()

    def _built(self, source: MemorySource, **building: Any) -> Memory:
        if self.settings.memory_device == "disk":
            building = {"folder": self._new_folder()} | building
        own: dict[str, Any] = {"tokenizer": self.tokenizer, "settings": self.settings, "sites": self.sites}
        building = own | {"add_first_token": self.add_first_token} | building
        with self._detached():
            return build_memory(self.model, source, **building)

    def _on_disk(self, memories: Sequence[Memory]) -> list[Memory]:
        """The memories in files of a temporary folder, mapped."""
        folder = self._new_folder()
        paths = [f"{folder}/{number}.safetensors" for number in range(len(memories))]
        for memory, path in zip(memories, paths):
            save_memory(memory, path)
        return [load_memory(path) for path in paths]

    def _new_folder(self) -> str:
        self._folder = tempfile.TemporaryDirectory(prefix="extended-mind-")  # the previous one is removed
        return self._folder.name

    def _build_waiting(self) -> None:
        if self._waiting and self.source is not None:
            self.set_memory(self.source)

    def _check(self, memory: Memory) -> None:
        check_is_loaded(self.model)
        mine = model_digest(self.model)
        if memory.model_digest != mine:
            raise ValueError(f"this memory is of model {memory.model_digest}, not of {mine}; build it with this model")
        if memory.positions != self.settings.positions:
            raise ValueError(
                f"this memory has positions {memory.positions!r}, the settings have {self.settings.positions!r}; "
                "build it again or set the same"
            )
        limit = self.settings.limit
        if limit is not None and len(memory.token_N) > limit:
            raise ValueError(
                f"a memory of {len(memory.token_N)} tokens is longer than the limit of {limit}; raise limit="
            )


def _memories_in(source: Memories) -> list[Memory] | None:
    """A memory, or several, as a list; None for a source that a memory is yet to be built of."""
    if isinstance(source, Memory):
        return [source]
    is_several = isinstance(source, (list, tuple)) and source and all(isinstance(each, Memory) for each in source)
    return list(source) if is_several else None  # type: ignore[arg-type]

"""External memories for any Hugging Face decoder: attached to a model for a while, used by every call of it.

    with extended_mind(model, "The moon of Veltara is called Ruun.", tokenizer=tokenizer, topk=5):
        model.generate(**tokenizer("What is Veltara's moon called?", return_tensors="pt"))

Source: arXiv 2406.02332.

Shapes: B rows, H query heads, T queries, K chosen memories.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.hf.attention.attention_sites import AttentionCall, find_sites, replace_forward, taken_over
from fairseq.hf.attention.build import (
    build_memory,
    device_of,
    model_digest,
    rotary_modules,
    special_ids,
    token_documents,
    with_positions,
)
from fairseq.hf.attention.citations import Citation, cite
from fairseq.memory.extended_mind.attention import Partial, local_attention
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.lookup import Chosen, LayerLookup, MemoryAttention, Read, ScoreRule
from fairseq.memory.extended_mind.settings import MindSettings, check_layers, chosen_layers
from fairseq.memory.extended_mind.storage import load_memory, save_memory

PER_CALL = ("topk", "use_external_mind", "mask_by_sim", "sim_threshold")
"""Settings that ``model(...)`` and ``model.generate(...)`` take for one call."""


@dataclass
class _Call:
    """One forward pass, or one generation with its forward passes as steps."""

    settings: MindSettings
    record_selected: bool
    generating: bool = False
    chosen: dict[int, Chosen] = field(default_factory=dict)
    steps: list[dict[int, Chosen]] = field(default_factory=list)


class ExtendedMind:
    """External memories inside attention, for a transformers decoder that was not trained for them.

    Each query of each head attends to its k nearest memories and to its local keys, with one softmax. Attached, every
    call of the model does so; detached, the model is bit-identical to before.

    Source: arXiv 2406.02332.

    ```python
    mind = ExtendedMind(model, [3, 1, 4, 1, 5, 9, 2, 6], topk=2)  # token ids, or a text with tokenizer=
    with mind:
        model.generate(ids_BT[:, :4], max_new_tokens=4, topk=1, pad_token_id=0)  # topk for this call
    ```
    """

    def __init__(
        self,
        model: Any,
        memory: Any = None,
        *,
        tokenizer: Any = None,
        layers: Sequence[int] | None = None,
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Find where the model attends, and build the memory.

        Args:
            model: a decoder that calls transformers' attention interface, or MPT.
            memory: a text, token ids, a list of either (documents), a ``Memory``, or a list of those, one per row.
            tokenizer: for memories of text, to know special tokens, and to print citations.
            layers: numbers of the layers that use memories; all by default.
            config: settings (``MindSettings`` in ``fairseq/memory/extended_mind/settings.py``) as a mapping.
            settings: settings by name; these take precedence.
        Raises: ValueError for anything that does not fit; the model stays as it is.
        """
        self.model, self.tokenizer = model, tokenizer
        self.settings = MindSettings.merged(config, settings)
        self.sites = find_sites(model)
        if layers is not None:
            by_layer = chosen_layers(layers, self.sites.num_layers)
            self.settings = self.settings.with_changes(use_external_mind_by_layer=by_layer)
        check_layers(self.settings.use_external_mind_by_layer, self.sites.num_layers)
        special_ids(model, tokenizer, self.settings)
        self.retrieved: list[dict[int, Chosen]] = []
        """What the last call that asked for it chose: by step and layer."""
        self.source: Any = None
        """What the memories are of: what was given last to be read."""
        self._memories: tuple[Memory, ...] = ()
        self._waiting = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lookups: dict[tuple[int, int], LayerLookup] = {}
        self._generating = 0
        self._undo: contextlib.ExitStack | None = None
        self._current: ContextVar[_Call | None] = ContextVar("extended_mind_call", default=None)
        if memory is not None:
            self.set_memory(memory)

    # Memories

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories: none, one for all rows, or one per row of a batch."""
        return self._memories

    def set_memory(self, memory: Any, **building: Any) -> None:
        """Replace the memories (see ``__init__``); ``building`` holds arguments of ``build_memory``."""
        self._must_not_generate()
        given = _memories_in(memory)
        memories = given or [self._built(memory, **building)]
        for each in memories:
            self._check(each)
        device = device_of(self.settings, self.model)
        memories = [each.to(device) for each in memories]
        if given and self.settings.memory_device == "disk":
            memories = self._on_disk(memories)
        self._memories, self.source, self._waiting = tuple(memories), memory, False
        self._lookups.clear()

    def set_memory_later(self, source: Any) -> None:
        """Replace the memories by ones that are built at the model's next call; None for none."""
        self.clear_memories()
        self.source, self._waiting = source, source is not None

    def add_memory(self, source: Any, **building: Any) -> None:
        """Append documents to the memory that all rows share."""
        self._must_not_generate()
        if len(self._memories) > 1:
            raise ValueError(f"there are {len(self._memories)} memories, one for each row; set them anew instead")
        if not self._memories:
            self.set_memory(source, **building)
            return
        old = self._memories[0]
        documents = token_documents(source, self.tokenizer)
        total, limit = len(old.token_N) + sum(map(len, documents)), self.settings.limit
        if limit is not None and total > limit:
            raise ValueError(f"a memory of {total} tokens is longer than the limit of {limit}; raise limit=")
        if old.positions == "relative":
            # All of them move when text comes behind them.
            starts = [*old.document_starts, len(old.token_N)]
            before = [old.token_N[start:stop] for start, stop in zip(starts, starts[1:])]
            self.set_memory([*before, *documents], **building)
        else:
            self.set_memory(old.followed_by(self._built(documents, **building)))

    def clear_memories(self) -> None:
        """Remove all memories."""
        self._must_not_generate()
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

    def _built(self, source: Any, **building: Any) -> Memory:
        if self.settings.memory_device == "disk":
            building = {"folder": self._new_folder()} | building
        building = {"tokenizer": self.tokenizer, "settings": self.settings, "sites": self.sites} | building
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
        self._folder = tempfile.TemporaryDirectory(prefix="extended-mind-")  # the one before goes
        return self._folder.name

    def _build_what_waits(self) -> None:
        if self._waiting:
            self.set_memory(self.source)

    def _check(self, memory: Memory) -> None:
        mine = model_digest(self.model)
        if memory.model_digest != mine:
            raise ValueError(f"this memory is of model {memory.model_digest}, not of {mine}; build it with this model")
        if memory.positions != self.settings.positions:
            raise ValueError(
                f"this memory has positions {memory.positions!r}, the settings say {self.settings.positions!r}; "
                "build it anew or set the same"
            )
        limit = self.settings.limit
        if limit is not None and len(memory.token_N) > limit:
            raise ValueError(
                f"a memory of {len(memory.token_N)} tokens is longer than the limit of {limit}; raise limit="
            )

    def _must_not_generate(self) -> None:
        if self._generating:
            raise ValueError("the memory cannot change while the model generates with it; wait until generate returns")

    # Attaching

    @property
    def attached(self) -> bool:
        """True while calls of the model use the memories."""
        return self._undo is not None

    def attach(self) -> ExtendedMind:
        """Use the memories in every call of the model. Raises: ValueError when they are attached."""
        if self._undo is not None:
            raise ValueError("these memories are attached already")
        with contextlib.ExitStack() as undo:
            undo.enter_context(taken_over(self.model, self))
            self._hook_positions(undo)
            undo.callback(replace_forward(self.model, _wrapped(self.model.forward, self._forward)))
            generate = getattr(self.model, "generate", None)
            if generate is not None:
                undo.callback(_set_for_a_while(self.model, "generate", _wrapped(generate, self._generate)))
            self._undo = undo.pop_all()
        return self

    def detach(self) -> None:
        """Restore the model. Does nothing when not attached."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def __enter__(self) -> ExtendedMind:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        """Memories are read without memories."""
        again = self.attached
        self.detach()
        try:
            yield
        finally:
            if again:
                self.attach()

    def _hook_positions(self, undo: contextlib.ExitStack) -> None:
        """With relative positions the local text stands behind the memory."""
        if self.settings.positions == "relative" and not self.sites.has_alibi:
            rotary = rotary_modules(self.model)
            for module in rotary or self.sites.modules.values():
                hook = module.register_forward_pre_hook(self._shift, with_kwargs=True)
                undo.callback(hook.remove)

    def _shift(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        call = self._current.get()
        if call is None or not call.settings.use_external_mind or not call.settings.topk or not self._memories:
            return None
        first = next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        sizes = [min(len(memory.token_N), memory.reach) + 1 for memory in self._of_rows(len(first))]
        shift_B1 = torch.tensor(sizes, device=first.device)[:, None]
        return with_positions(module, inputs, named, lambda position_ids: position_ids + shift_B1)

    # Calls

    def _forward(
        self, own: Callable[..., Any], *inputs: Any, output_retrieved_memory_idx: bool = False, **named: Any
    ) -> Any:
        changes = {name: named.pop(name) for name in PER_CALL if name in named}
        if self._current.get() is None:
            self._build_what_waits()
        outer = self._current.get()
        settings = (outer.settings if outer else self.settings).with_changes(**changes)
        call = _Call(settings, output_retrieved_memory_idx or bool(outer and outer.record_selected))
        call.generating = bool(outer and outer.generating)
        token = self._current.set(call)
        try:
            result = own(*inputs, **named)
        finally:
            self._current.reset(token)
        if not call.record_selected:
            return result
        if outer is not None:
            outer.steps.append(call.chosen)
        else:
            self.retrieved = [call.chosen]
            if isinstance(result, tuple):
                raise ValueError("output_retrieved_memory_idx=True needs return_dict=True: a tuple has no place for it")
            numbers = self._numbers(call.chosen)
            result["retrieved_memory_idx"] = numbers
            result["attentions"] = (result.get("attentions"), _flat(numbers))
        return result

    def _generate(
        self, own: Callable[..., Any], *inputs: Any, output_retrieved_memory_idx: bool = False, **named: Any
    ) -> Any:
        changes = {name: named.pop(name) for name in PER_CALL if name in named}
        if output_retrieved_memory_idx and self.model.config._attn_implementation != "extended_mind_eager":
            named.pop("output_attentions", None)  # there are none to tell, and asking for them is an error
        self._build_what_waits()
        call = _Call(self.settings.with_changes(**changes), output_retrieved_memory_idx, generating=True)
        token = self._current.set(call)
        self._generating += 1
        try:
            result = own(*inputs, **named)
        finally:
            self._generating -= 1
            self._current.reset(token)
        if output_retrieved_memory_idx:
            self.retrieved = call.steps
            if isinstance(result, dict):
                numbers = tuple(self._numbers(step) for step in call.steps)
                own_attentions = result.get("attentions") or (None,) * len(numbers)
                result["retrieved_memory_idx"] = numbers
                result["attentions"] = tuple(zip(own_attentions, map(_flat, numbers)))
        return result

    def _numbers(self, chosen: Mapping[int, Chosen]) -> tuple[Tensor | None, ...]:
        layers = range(self.sites.num_layers)
        return tuple(chosen[layer].token_BHTK if layer in chosen else None for layer in layers)

    def citations(self, top: int = 3, span: int = 12, row: int = 0) -> list[Citation]:
        """The passages that contributed most to the last call with ``output_retrieved_memory_idx=True``, best first.

        Raises: ValueError when there was no such call.
        """
        if not self.retrieved:
            raise ValueError("nothing to cite: call the model with output_retrieved_memory_idx=True first")
        rows = len(next(iter(self.retrieved[-1].values())).token_BHTK)
        return cite(
            self.retrieved, self._of_rows(rows, True)[row], top=top, span=span, row=row, tokenizer=self.tokenizer
        )

    # The model's attention

    def wants(self, layer: int) -> bool:
        """Whether a layer uses memories in this call."""
        call = self._current.get()
        return bool(self._memories) and call is not None and call.settings.uses(layer)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over memories and local keys with one softmax."""
        current = self._current.get()
        assert current is not None
        local = local_attention(call.query_BHTD, call.key_BGLD, call.value_BGLD, call.rule)
        if call.sink_H is not None:
            local = _with_sink(local, call.sink_H)
        memories = self._of_rows(len(call.query_BHTD), current.generating)
        looked = self._attended(call, memories, current.settings)
        if current.record_selected:
            read = looked.read()
            norm_BHT = torch.logaddexp(local.norm_BHT, looked.partial.norm_BHT).to(read.score_BHTK.device)
            current.chosen[call.layer] = Chosen(read.ids_BHTK, read.similarity_BHTK, read.score_BHTK, norm_BHT)
        return local.joined(looked.partial).transpose(1, 2).contiguous(), None

    def _attended(self, call: AttentionCall, memories: Sequence[Memory], settings: MindSettings) -> MemoryAttention:
        """What the rows take from their memories; ``read`` tells numbers of the user's tokens."""
        rule = ScoreRule(call.rule.scale, call.rule.softcap, call.slope_H)
        before_B = None if call.first_B is None else call.first_B - call.key_BGLD.shape[2]
        # Rows that follow each other and share a memory look together.
        runs: list[list[int]] = []
        for row, memory in enumerate(memories):
            if runs and memories[runs[-1][0]] is memory:
                runs[-1].append(row)
            else:
                runs.append([row])
        parts = []
        for run in runs:
            rows = slice(run[0], run[-1] + 1)
            lookup = self._lookup(memories[run[0]], call.layer)
            own = ScoreRule(rule.scale, rule.softcap, rule.slope_H, None if before_B is None else before_B[rows])
            looked = lookup.look(call.query_BHTD[rows], own, settings)
            parts.append(MemoryAttention(looked.partial, functools.partial(lookup.in_tokens, looked.read)))
        return parts[0] if len(parts) == 1 else _stacked(parts)

    def _lookup(self, memory: Memory, layer: int) -> LayerLookup:
        key = (id(memory), layer)
        if key not in self._lookups:
            self._lookups[key] = LayerLookup(memory, layer, self.settings)
        return self._lookups[key]

    def _of_rows(self, rows: int, generating: bool | None = None) -> list[Memory]:
        """The memory of each row. While generating, beams of a sequence follow each other and share its memory."""
        current = self._current.get()
        generating = bool(current and current.generating) if generating is None else generating
        count = len(self._memories)
        if count == 1:
            return [self._memories[0]] * rows
        if rows != count and not (generating and rows % count == 0):
            raise ValueError(f"a batch of {rows} rows and {count} memories; give one memory, or one for each row")
        return [self._memories[row * count // rows] for row in range(rows)]


@contextlib.contextmanager
def extended_mind(model: Any, memory: Any = None, **settings: Any) -> Iterator[ExtendedMind]:
    """Context manager: ``model`` uses ``memory`` while the block runs. The arguments are those of ``ExtendedMind``.

    ```python
    with torch.no_grad(), extended_mind(model, [3, 1, 4, 1, 5, 9, 2, 6], topk=2) as mind:
        model(ids_BT[:1], output_retrieved_memory_idx=True)
        mind.citations(top=1)  # the passage that contributed most
    ```
    """
    with ExtendedMind(model, memory, **settings) as mind:
        yield mind


def _memories_in(source: Any) -> list[Memory] | None:
    """What is a memory already, or several; None for what has to be built."""
    if isinstance(source, Memory):
        return [source]
    is_several = isinstance(source, (list, tuple)) and source and all(isinstance(each, Memory) for each in source)
    return list(source) if is_several else None


def _wrapped(own: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(own, ...)`` with the signature of ``own``, which transformers reads."""
    return functools.wraps(own)(functools.partial(wrapper, own))


def _set_for_a_while(model: Any, name: str, value: Any) -> Callable[[], None]:
    had, before = name in model.__dict__, model.__dict__.get(name)
    setattr(model, name, value)

    def undo() -> None:
        delattr(model, name)
        if had:
            setattr(model, name, before)

    return undo


def _with_sink(local: Partial, sink_H: Tensor) -> Partial:
    norm_BHT = torch.logaddexp(local.norm_BHT, sink_H.float()[:, None].expand_as(local.norm_BHT))
    shrunk_BHTD = local.out_BHTD * (local.norm_BHT - norm_BHT).exp()[..., None].to(local.out_BHTD.dtype)
    return Partial(shrunk_BHTD, norm_BHT)


def _stacked(parts: Sequence[MemoryAttention]) -> MemoryAttention:
    """Rows of several memories, filled up to the most memories any of them chose."""
    outs, norms = ([getattr(part.partial, name) for part in parts] for name in ("out_BHTD", "norm_BHT"))

    def read() -> Read:
        each = [part.read() for part in parts]
        most = max(part.ids_BHTK.shape[-1] for part in each)

        def filled(name: str, value: float) -> Tensor:
            tensors = [getattr(part, name) for part in each]
            return torch.cat([nn.functional.pad(x, (0, most - x.shape[-1]), value=value) for x in tensors])

        return Read(filled("ids_BHTK", -1), filled("similarity_BHTK", -torch.inf), filled("score_BHTK", -torch.inf))

    return MemoryAttention(Partial(torch.cat(outs), torch.cat(norms)), read)


def _flat(numbers: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The original's layout: (B, H, T * K), query by query."""
    return tuple(None if x_BHTK is None else x_BHTK.flatten(2) for x_BHTK in numbers)

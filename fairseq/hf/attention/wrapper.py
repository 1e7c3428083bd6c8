"""External memories for any Hugging Face decoder: attached to a model for a while, used by every call of it.

    with extended_mind(model, "The moon of Veltara is called Ruun.", tokenizer=tokenizer, topk=5):
        model.generate(**tokenizer("What is Veltara's moon called?", return_tensors="pt"))

Source: arXiv 2406.02332.

Shapes: B rows, H query heads, T queries, K chosen memories.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairseq.hf.attention.attention_sites import AttentionCall, check_still_taken_over, taken_over
from fairseq.hf.attention.build import rotary_modules, with_positions
from fairseq.hf.attention.citations import Citation, cite
from fairseq.hf.attention.memory_set import Memories, MemorySet
from fairseq.hf.hooks.continuous_batching import rejecting_continuous_batching
from fairseq.hf.hooks.patching import replace_attribute, replace_forward, wrapped
from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.memory.extended_mind.attention import Partial, local_attention
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.lookup import MemoryAttention, RetrievedMemories, ScoreRule, SelectedMemories
from fairseq.memory.extended_mind.settings import MindSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_CALL = ("topk", "use_external_mind", "mask_by_sim", "sim_threshold")
"""Settings that ``model(...)`` and ``model.generate(...)`` take for one call."""
_CONTINUOUS_BATCHING = (
    "memories inside attention do not work with continuous batching (generate_batch), which puts all requests into one "
    "row and sets an attention function of its own; use model.generate"
)


@dataclass
class _Call:
    """One forward pass, or one generation with its forward passes as steps."""

    settings: MindSettings
    record_selected: bool
    generating: bool = False
    selected: dict[int, SelectedMemories] = field(default_factory=dict)
    steps: list[dict[int, SelectedMemories]] = field(default_factory=list)


class ExtendedMind(MemorySet):
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
        model: PreTrainedModel,
        memory: Memories | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        layers: Sequence[int] | None = None,
        config: Mapping[str, Any] | None = None,
        add_first_token: bool = True,
        **settings: object,
    ) -> None:
        """Find where the model attends, and build the memory.

        Args:
            model: a decoder that calls transformers' attention interface, or MPT; of a peft or compiled model, the
                model inside takes the memories.
            memory: a text, token ids, a list of either (documents), a ``Memory``, or a list of those, one per row.
            tokenizer: for memories of text, to know special tokens, and to print citations.
            layers: numbers of the layers that use memories; all by default.
            add_first_token: read a text after the model's first token (beginning of sequence, or the separator of
                documents) where the tokenizer adds none; it is neither cited nor numbered.
            config: settings (``MindSettings`` in ``fairseq/memory/extended_mind/settings.py``) as a mapping.
            settings: settings by name; these take precedence.
        Raises: ValueError for anything that does not fit; the model stays as it is.
        """
        super().__init__(
            model, tokenizer=tokenizer, layers=layers, config=config, add_first_token=add_first_token, **settings
        )
        self.retrieved: list[dict[int, SelectedMemories]] = []
        """Memories of the last call that recorded them, by step and layer."""
        self._generating = 0
        self._undo: contextlib.ExitStack | None = None
        self._current: ContextVar[_Call | None] = ContextVar("extended_mind_call", default=None)
        if memory is not None:
            self.set_memory(memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExtendedMind:
        """Itself, for a copy of a model that still reaches it. Raises: ValueError while it is attached."""
        if self.attached:
            raise ValueError(
                f"this {type(self.model).__name__} has memories attached and cannot be copied: attention of the copy "
                "would be without them; detach them first"
            )
        return self

    def _check_may_change(self) -> None:
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
            undo.enter_context(rejecting_continuous_batching(self.model, _CONTINUOUS_BATCHING))
            # The model below the output embedding, which others call without passing the model's forward (trl does).
            undo.callback(self.model.base_model.register_forward_pre_hook(self._before_layers).remove)
            undo.callback(replace_forward(self.model, wrapped(self.model, self.model.forward, self._forward)))
            generate = getattr(self.model, "generate", None)
            if generate is not None:
                undo.callback(replace_attribute(self.model, "generate", wrapped(self.model, generate, self._generate)))
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
        """With relative positions the local text follows the memory."""
        if self.settings.positions == "relative" and not self.sites.has_alibi:
            rotary = rotary_modules(self.model)
            for module in rotary or self.sites.modules.values():
                hook = module.register_forward_pre_hook(self._shift, with_kwargs=True)
                undo.callback(hook.remove)

    def _shift(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        settings = self._now().settings
        if not settings.use_external_mind or not settings.topk or not self._memories:
            return None
        first = next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        sizes = [min(len(memory.token_N), memory.reach) + 1 for memory in self._of_rows(len(first))]
        shift_B1 = torch.tensor(sizes, device=first.device)[:, None]
        return with_positions(module, inputs, named, lambda position_ids: position_ids + shift_B1)

    # Calls

    def _now(self) -> _Call:
        """The call that runs now; one without settings of its own where the model's ``forward`` is not on the stack.

        Layers run so when something calls the model below the output embedding, and when gradient checkpointing
        computes them again.
        """
        return self._current.get() or _Call(self.settings, record_selected=False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_layers(self, module: nn.Module, inputs: object) -> None:
        check_still_taken_over(self.model)
        if self._current.get() is None:
            self._build_waiting()

    def _check_is_repeatable(self, changes: Mapping[str, Any]) -> None:
        """Raise ValueError where layers will be computed again after a call whose settings are forgotten by then."""
        if not changes or not self.model.training or not torch.is_grad_enabled():
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError(
                f"{', '.join(changes)} for one call and gradient checkpointing exclude each other, because layers are "
                "computed again after the call; give the settings to extended_mind"
            )

    def _forward(
        self, own: Callable[..., Any], *inputs: object, output_retrieved_memory_idx: bool = False, **named: object
    ) -> Any:
        if not self.attached:  # and still reached, through a forward that was put over this one
            return own(*inputs, **named)
        changes = {name: named.pop(name) for name in PER_CALL if name in named}
        self._check_is_repeatable(changes)
        if self._current.get() is None:
            self._build_waiting()
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
            outer.steps.append(call.selected)
        else:
            self.retrieved = [call.selected]
            if isinstance(result, tuple):
                raise ValueError("output_retrieved_memory_idx=True needs return_dict=True: a tuple has no place for it")
            numbers = self._numbers(call.selected)
            result["retrieved_memory_idx"] = numbers
            result["attentions"] = (result.get("attentions"), _flat(numbers))
        return result

    def _generate(
        self, own: Callable[..., Any], *inputs: object, output_retrieved_memory_idx: bool = False, **named: object
    ) -> Any:
        if not self.attached:
            return own(*inputs, **named)
        changes = {name: named.pop(name) for name in PER_CALL if name in named}
        if output_retrieved_memory_idx and self.model.config._attn_implementation != "extended_mind_eager":
            named.pop("output_attentions", None)  # there are none to return, and asking for them is an error
        self._build_waiting()
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

    def _numbers(self, selected: Mapping[int, SelectedMemories]) -> tuple[Tensor | None, ...]:
        layers = range(self.sites.num_layers)
        return tuple(selected[layer].token_BHTK if layer in selected else None for layer in layers)

    def citations(self, top: int = 3, span: int = 12, row: int = 0) -> list[Citation]:
        """The passages that contributed most to the last call with ``output_retrieved_memory_idx=True``, best first.

        Raises: ValueError when there was no such call.
        """
        if not self.retrieved:
            raise ValueError("nothing to cite: call the model with output_retrieved_memory_idx=True first")
        rows = len(next(iter(self.retrieved[-1].values())).token_BHTK)
        return cite(
            self.retrieved,
            self._memories_of(rows, generating=True)[row],
            top=top,
            span=span,
            row=row,
            tokenizer=self.tokenizer,
        )

    # The model's attention

    def wants(self, layer: int) -> bool:
        """True if a layer uses memories in this call."""
        return bool(self._memories) and self._now().settings.uses(layer)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Attention over memories and local keys with one softmax."""
        # Scores and their sums are computed in float32 also where products are to be of half precision.
        with torch.autocast(call.query_BHTD.device.type, enabled=False):
            return self._attend(call, self._now())

    def _attend(self, call: AttentionCall, current: _Call) -> tuple[Tensor, Tensor | None]:
        local = local_attention(call.query_BHTD, call.key_BGLD, call.value_BGLD, call.rule)
        if call.sink_H is not None:
            local = _with_sink(local, call.sink_H)
        memories = self._memories_of(len(call.query_BHTD), generating=current.generating)
        attended = self._attended(call, memories, current.settings)
        if current.record_selected:
            read = attended.read()
            norm_BHT = torch.logaddexp(local.norm_BHT, attended.partial.norm_BHT).to(read.score_BHTK.device)
            current.selected[call.layer] = SelectedMemories(
                read.ids_BHTK, read.similarity_BHTK, read.score_BHTK, norm_BHT
            )
        return local.joined(attended.partial).transpose(1, 2).contiguous(), None

    def _attended(self, call: AttentionCall, memories: Sequence[Memory], settings: MindSettings) -> MemoryAttention:
        """Attention of each row to its memories; ``read`` returns numbers of the user's tokens."""
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
            attended = lookup.attend(call.query_BHTD[rows], own, settings)
            parts.append(MemoryAttention(attended.partial, functools.partial(lookup.in_tokens, attended.read)))
        return parts[0] if len(parts) == 1 else _stacked(parts)

    def _of_rows(self, rows: int) -> list[Memory]:
        return self._memories_of(rows, generating=self._now().generating)


@contextlib.contextmanager
def extended_mind(model: PreTrainedModel, memory: Memories | None = None, **settings: Any) -> Iterator[ExtendedMind]:
    """Context manager: ``model`` uses ``memory`` while the block runs. The arguments are those of ``ExtendedMind``.

    ```python
    with torch.no_grad(), extended_mind(model, [3, 1, 4, 1, 5, 9, 2, 6], topk=2) as mind:
        model(ids_BT[:1], output_retrieved_memory_idx=True)
        mind.citations(top=1)  # the passage that contributed most
    ```
    """
    with ExtendedMind(model, memory, **settings) as mind:
        yield mind


def _with_sink(local: Partial, sink_H: Tensor) -> Partial:
    norm_BHT = torch.logaddexp(local.norm_BHT, sink_H.float()[:, None].expand_as(local.norm_BHT))
    shrunk_BHTD = local.out_BHTD * (local.norm_BHT - norm_BHT).exp()[..., None].to(local.out_BHTD.dtype)
    return Partial(shrunk_BHTD, norm_BHT)


def _stacked(parts: Sequence[MemoryAttention]) -> MemoryAttention:
    """Rows of several memories, filled up to the most memories any of them chose."""
    outs, norms = ([getattr(part.partial, name) for part in parts] for name in ("out_BHTD", "norm_BHT"))

    def read() -> RetrievedMemories:
        each = [part.read() for part in parts]
        widest = max(part.ids_BHTK.shape[-1] for part in each)

        def filled(name: str, value: float) -> Tensor:
            tensors = [getattr(part, name) for part in each]
            return torch.cat([nn.functional.pad(x, (0, widest - x.shape[-1]), value=value) for x in tensors])

        return RetrievedMemories(
            filled("ids_BHTK", -1), filled("similarity_BHTK", -torch.inf), filled("score_BHTK", -torch.inf)
        )

    return MemoryAttention(Partial(torch.cat(outs), torch.cat(norms)), read)


def _flat(numbers: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The original's layout: (B, H, T * K), query by query."""
    return tuple(None if x_BHTK is None else x_BHTK.flatten(2) for x_BHTK in numbers)

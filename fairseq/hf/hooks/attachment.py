"""Base class for wrappers: hooks every forward call and restores the model when detached."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.capture import Capture
from fairseq.hf.hooks.causality import require_causal
from fairseq.hf.hooks.inner_model import check_is_loaded, inner_model, parameters_of, running_eagerly
from fairseq.hf.hooks.key_value_cache import cache_of, num_cached
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.patching import is_running, replace_forward, wrapped
from fairseq.hf.hooks.protocols import ModelOutput
from fairseq.hf.hooks.seq2seq import is_seq2seq
from fairseq.hf.hooks.taps import LayerField, Tap, find_tap, num_layers, output_embedding

Self = TypeVar("Self", bound="Attachment")
IGNORED = -100
"""Label of a position that does not count, as in transformers."""

_BROKEN_INTO: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ForwardCall:
    """A forward call of a model, by the names of its parameters. Shapes: B sequences, T positions, L with scores."""

    named: Mapping[str, Any]
    is_seq2seq: bool = False
    num_cached: int | None = None
    """Tokens in the key-value cache before the call; None where there is no cache, or one that does not count them."""

    @property
    def labels(self) -> Tensor | None:
        """Labels as they were given."""
        given: Tensor | None = self.named.get("labels")
        return given

    @property
    def input_ids(self) -> Tensor | None:
        """The decoder's input ids, (B, T); None if it is given embeddings."""
        ids: Tensor | None = self.named.get("decoder_input_ids" if self.is_seq2seq else "input_ids")
        return ids

    def num_positions(self, num_scores: int) -> int:
        """T, of a call that made scores of ``num_scores`` positions."""
        decoder = "decoder_" if self.is_seq2seq else ""
        for given in (self.input_ids, self.named.get(f"{decoder}inputs_embeds"), self.target()):
            if given is not None:
                return int(given.shape[1])
        return num_scores

    def target(self) -> Tensor | None:
        """The token to predict at each position, (B, T), ``IGNORED`` where none counts; None without labels.

        A decoder without an encoder is given its own inputs as labels: what counts at t is the label of t + 1.
        """
        shifted: Tensor | None = self.named.get("shift_labels")
        if shifted is not None or self.labels is None:
            return shifted
        if self.is_seq2seq:
            return self.labels
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED)

    def is_text(self, num_positions: int) -> Tensor | None:
        """True where there is no padding, (B, T), by the attention mask; None for a call without one."""
        mask = self.named.get("decoder_attention_mask" if self.is_seq2seq else "attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < num_positions:
            return None
        return mask[:, mask.shape[1] - num_positions :] != 0

    def starts(self, num_positions: int) -> Tensor | None:
        """True where another sequence of a packed row begins, (1 or B, T); None for a call that packs nothing.

        Packing shows in ``position_ids`` that begin anew, or in the lengths or numbers of the sequences.
        """
        position_BT, number_BT = self.named.get("position_ids"), self.named.get("seq_idx")
        starts_BT: Tensor | None = None
        if isinstance(number_BT, Tensor) and number_BT.ndim == 2:
            starts_BT = number_BT.diff(dim=1) != 0
        elif isinstance(position_BT, Tensor) and position_BT.ndim == 2 and not self.is_seq2seq:
            starts_BT = position_BT.diff(dim=1) != 1
        elif isinstance(lengths := self.named.get("cu_seq_lens_q"), Tensor):
            starts_BT = torch.zeros(1, num_positions - 1, dtype=torch.bool, device=lengths.device)
            inner = lengths[(lengths > 0) & (lengths < num_positions)].long() - 1
            starts_BT[0, inner] = True
        if starts_BT is None or starts_BT.shape[1] != num_positions - 1:
            return None
        starts_BT = torch.nn.functional.pad(starts_BT, (1, 0))
        if isinstance(position_BT, Tensor) and position_BT.ndim == 2 and not self.is_seq2seq:
            starts_BT[:, 0] |= position_BT[:, 0] == 0  # whatever a cache holds
        return starts_BT

    def kept(self, values_BT: Tensor, num_scores: int) -> Tensor:
        """The columns (or rows of keys) of those positions that have scores, (B, L, ...)."""
        if values_BT.shape[1] == num_scores:
            return values_BT
        which = self.named.get("logits_to_keep", 0)
        if isinstance(which, Tensor) and which.ndim:
            return values_BT[:, which]
        return values_BT[:, values_BT.shape[1] - num_scores :]


class Attachment:
    """Base of what can be broken into a model; one at a time in a model, and into one model at a time.

    ``break_into(model)`` and ``break_out()``; or ``with attachment(model): ...``, which undoes itself whatever happens.
    """

    def __init__(self, kind: KeyType) -> None:
        self._kind = kind
        self._model: nn.Module | None = None
        self._capture: Capture | None = None
        self._undo = contextlib.ExitStack()
        self._parameters: list[str] = []
        self._num_layers: int | None = None
        self._layer_field: LayerField | None = None
        self._has_encoder = False
        self._thread = _PerThread()
        self._lock = threading.RLock()

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """Itself: a copy of the model shares what is attached to it."""
        return self

    @property
    def model(self) -> nn.Module:
        """The model it is attached to: of a peft or compiled one, the model inside.

        Raises: ValueError when it is attached to none.
        """
        if self._model is None:
            raise ValueError(f"this {type(self).__name__} is not in a model; call break_into(model) first")
        return self._model

    @property
    def tap(self) -> Tap:
        """Place in the model where keys are read. Raises: ValueError when it is attached to none."""
        assert self.model is not None
        assert self._capture is not None
        return self._capture.tap

    @property
    def is_seq2seq(self) -> bool:
        """True if the model has an encoder; its labels are then the tokens to predict, not its inputs."""
        return is_seq2seq(self.model)

    def break_into(self: Self, model: nn.Module) -> Self:
        """Attach to a model; every forward call then passes here. Returns itself, for use in ``with``.

        Raises: ValueError, with the model as it was, when model or files do not fit or either is taken.
        """
        given, model = model, inner_model(model)
        check_free(self, self._model, model)
        check_can_be_tapped(model)
        tap = find_tap(model, self._kind)
        self._prepare(model, tap)
        self._parameters, self._layer_field = parameters_of(model), LayerField.of(model)
        self._num_layers, self._has_encoder = self._layer_field.num_layers, is_seq2seq(model)
        self._model, self._capture = model, Capture(tap, self._check_passed)
        self._undo.callback(self._capture.remove)
        self._undo.enter_context(running_eagerly(given))
        # A forward of its own, not hooks: peft calls the forward of the model inside, and compiled code skips hooks.
        self._own_forward = wrapped(model, model.forward, self._forward)
        self._undo.callback(replace_forward(model, self._own_forward))
        self._undo.callback(model.register_forward_pre_hook(self._expect).remove)
        self._undo.callback(model.register_forward_hook(self._check_reached).remove)
        _BROKEN_INTO[model] = self
        return self

    def break_out(self) -> None:
        """Restore the model. Does nothing when attached to none."""
        self._leave(failed=False)

    def __call__(self: Self, model: nn.Module) -> Self:
        """``break_into``, so that ``with KNNWrapper(...)(model):`` reads as what it does."""
        return self.break_into(model)

    def __enter__(self: Self) -> Self:
        assert self._model is not None, "enter with attachment(model)"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._leave(failed=kind is not None)

    def _leave(self, *, failed: bool) -> None:
        if self._model is None:
            return
        self._undo.close()
        _BROKEN_INTO.pop(self._model, None)
        self._model, self._capture = None, None
        self._end(failed=failed)

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        """Open what is needed and check that it fits the model, before the model is touched."""

    def _end(self, *, failed: bool) -> None:
        """Let go of what ``_prepare`` opened."""

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        """The call the model is to get."""
        return named

    def _see(self, call: ForwardCall, capture: Capture, output: ModelOutput) -> ModelOutput:
        """Look at a call that has been made, given its keys; returns what the caller is to get."""
        raise NotImplementedError

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: forward calls of this thread return the model's own output while the block runs."""
        before, self._thread.is_paused = self._thread.is_paused, True
        try:
            yield
        finally:
            self._thread.is_paused = before

    def _is_idle(self) -> bool:
        """True while calls pass unseen."""
        return self._thread.is_paused

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, own: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """The model's forward call while this is attached. It stays attached whatever is raised."""
        model, self._thread.is_reached = self._model, True
        # Early exit drafts with the first layers of the model itself: such calls never reach the memory's layer.
        if model is None or self._thread.is_inside or self._is_idle() or not self._runs_all_layers(model):
            return own(*inputs, **named)
        assert self._capture is not None
        self._capture.clear()
        named = named_inputs(model, self._parameters, inputs) | named
        self._thread.is_inside = True
        try:
            with self._lock:
                changed = self._changed_call(dict(named))
            call = ForwardCall(named, self._has_encoder, num_cached(cache_of(named)))
            output = own(**(changed | {"return_dict": True}))
            with self._lock:
                output = self._see(call, self._capture, output)
        finally:
            self._thread.is_inside = False
        wants_dict = named.get("return_dict")
        wants_dict = getattr(model.config, "return_dict", True) if wants_dict is None else wants_dict
        return output if wants_dict else output.to_tuple()

    def _runs_all_layers(self, model: nn.Module) -> bool:
        field = self._layer_field
        now = field.num_layers if field is not None and field.config is model.config else num_layers(model)
        return now == self._num_layers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _expect(self, model: nn.Module, inputs: object) -> None:
        self._thread.is_reached = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check_reached(self, model: nn.Module, inputs: object, output: object) -> None:
        """Raise ValueError when a forward that was put over this one has not called it."""
        if not self._thread.is_reached and not self._thread.is_inside and not self._is_idle():
            self._raise_not_reached()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check_passed(self) -> None:
        """The same, where that forward is called by itself and hooks of the model are passed by (older peft does)."""
        model = self._model
        if model is None or self._thread.is_inside or self._is_idle():
            return
        present = vars(model).get("forward", self._own_forward)
        if present is not self._own_forward and is_running(present):
            self._raise_not_reached()

    def _raise_not_reached(self) -> NoReturn:
        raise ValueError(
            f"forward of this {type(self.model).__name__} was replaced after break_into, and the new one does not call "
            f"the {type(self).__name__}: its logits and loss are the model's alone (trl's fused_lm_head does this); "
            "call break_into after the replacement"
        )


class _PerThread(threading.local):
    """State of the call that a thread is making."""

    is_reached = False
    is_paused = False
    is_inside = False


def named_inputs(model: nn.Module, parameters: Sequence[str], inputs: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by name. Raises: ValueError when there are more of them than names."""
    if len(inputs) > len(parameters):
        raise ValueError(
            f"forward of this {type(model).__name__} got {len(inputs)} positional arguments, of which only "
            f"{len(parameters)} have names; pass them by name (input_ids=...)"
        )
    return dict(zip(parameters, inputs))


def require_logits(output: ModelOutput, attachment: str) -> Tensor:
    """The logits of an output. Raises: ValueError when the model made none."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"the forward call made no logits, and {attachment} mixes its memory into them; turn off the fused or "
            "chunked loss (fused_lm_head of trl, use_liger_kernel)"
        )
    return logits


def check_free(attachment: Attachment, present: nn.Module | None, model: nn.Module) -> None:
    """Raise ValueError when the attachment is in a model, or the model has one."""
    name, kind = type(attachment).__name__, type(model).__name__
    if present is model:
        raise ValueError(f"this {name} is in this {kind} already; break_out() first")
    if present is not None:
        raise ValueError(f"this {name} is in another {type(present).__name__}; break_out() first, or make a second one")
    if isinstance(model, nn.Module) and model in _BROKEN_INTO:
        raise ValueError(f"this {kind} has a {type(_BROKEN_INTO[model]).__name__} in it already; break that one out")


def check_can_be_tapped(model: nn.Module) -> None:
    """Raise ValueError unless the model is one that predicts tokens, with all its weights at hand."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(f"{kind} is not a transformers model; load one with AutoModelForCausalLM")
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None)
    if quantizer is not None and not getattr(settings, "dequantize", False):
        method = getattr(settings, "quant_method", "unknown")
        raise ValueError(
            f"this {kind} is quantised ({getattr(method, 'value', method)}) and cannot be tapped; load it without a "
            "quantization_config (or with dequantize=True), in torch.bfloat16 to save memory"
        )
    check_is_loaded(model)
    output_embedding(model)
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ValueError(
            f"{kind} does not predict the next token; load the model with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    require_causal(model)

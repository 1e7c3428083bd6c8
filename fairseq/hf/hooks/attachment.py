"""Base class for wrappers: hooks every forward call and restores the model when detached."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fairseq.hf.hooks.capture import Capture
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.protocols import ModelOutput
from fairseq.hf.hooks.taps import Tap, find_tap, output_embedding

Self = TypeVar("Self", bound="Attachment")
IGNORED = -100
"""Label of a position that does not count, as in transformers."""

_BROKEN_INTO: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ForwardCall:
    """A forward call of a model, by the names of its parameters. Shapes: B sequences, T positions, L with scores."""

    named: Mapping[str, Any]
    is_seq2seq: bool

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
        self._handles: list[Any] = []
        self._parameters: list[str] = []
        self._call: ForwardCall | None = None
        self._paused = False

    @property
    def model(self) -> nn.Module:
        """The model it is attached to. Raises: ValueError when it is attached to none."""
        if self._model is None:
            raise ValueError(f"this {type(self).__name__} is not in a model; break_into(model) comes first")
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
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def break_into(self: Self, model: nn.Module) -> Self:
        """Attach to a model; every forward call then passes here. Returns itself, for use in ``with``.

        Raises: ValueError, with the model as it was, when model or files do not fit or either is taken.
        """
        check_free(self, self._model, model)
        check_can_be_tapped(model)
        tap = find_tap(model, self._kind)
        self._prepare(model, tap)
        self._parameters = parameters_of(model)
        self._model, self._capture = model, Capture(tap)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
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
        for handle in self._handles:
            handle.remove()
        assert self._capture is not None
        self._capture.remove()
        _BROKEN_INTO.pop(self._model, None)
        self._model, self._capture, self._handles = None, None, []
        self._end(failed=failed)

    def _prepare(self, model: nn.Module, tap: Tap) -> None:
        """Open what is needed and check that it fits the model, before the model is touched."""

    def _end(self, *, failed: bool) -> None:
        """Let go of what ``_prepare`` opened."""

    def _changed_call(self, named: dict[str, Any]) -> dict[str, Any]:
        """The call the model is to get."""
        return named

    def _see(self, call: ForwardCall, key_BTD: Tensor, output: ModelOutput) -> ModelOutput:
        """Look at a call that has been made, given its keys; returns what the caller is to get."""
        raise NotImplementedError

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: forward calls return the model's own output while the block runs."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _is_idle(self) -> bool:
        """True while calls pass unseen."""
        return self._paused

    def _before(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._call = None
        if self._is_idle():
            return None
        assert self._capture is not None
        self._capture.clear()
        if inputs:
            named = dict(zip(self._parameters, inputs)) | named
        with self._leaving_on_failure():
            changed = self._changed_call(dict(named))
        self._call = ForwardCall(named, self.is_seq2seq)
        return (), changed | {"return_dict": True}

    def _after(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: ModelOutput) -> Any:
        call = self._call
        if call is None:
            return None
        assert self._capture is not None
        with self._leaving_on_failure(), torch.no_grad():
            output = self._see(call, self._capture.take(output.logits.shape[0]), output)
        wants_dict = call.named.get("return_dict")
        wants_dict = getattr(model.config, "return_dict", True) if wants_dict is None else wants_dict
        return output if wants_dict else output.to_tuple()

    @contextmanager
    def _leaving_on_failure(self) -> Iterator[None]:
        """Leave the model as it was before an error of ours reaches the user."""
        try:
            yield
        except Exception:
            self._leave(failed=True)
            raise


def parameters_of(model: nn.Module) -> list[str]:
    """Names of the parameters of a model's forward call, in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


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
    away = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    if away:
        raise ValueError(
            f"{len(away)} parameters of this {kind} are offloaded or not loaded (device meta), {away[0]} for one: it "
            "cannot be tapped; load it whole, without a device_map that puts parts on cpu or disk"
        )
    output_embedding(model)
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ValueError(
            f"{kind} does not predict the next token; load the model with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )

"""The module that computes inside a model that is wrapped by peft, ``torch.compile``, DDP or a class of the user's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model that makes the logits, in ``model``; ``model`` itself if it is one, or holds none.

    ``generate`` of a peft model and of a compiled one calls the model inside, so that is where a wrapper has to be.
    """
    if not isinstance(model, nn.Module):
        return model
    for name in ("_orig_mod", "module"):  # torch.compile; DataParallel and DDP
        inside = model._modules.get(name)
        if isinstance(inside, nn.Module) and not _is_transformers(model):
            return inner_model(inside)
    if _is_peft(model):
        return inner_model(model.get_base_model())  # type: ignore[operator]
    if _is_transformers(model):
        return model
    found = [module for module in _outermost(model) if hasattr(module, "get_output_embeddings")]
    return found[0] if len(found) == 1 else model


def _is_peft(model: nn.Module) -> bool:
    return hasattr(type(model), "get_base_model") and hasattr(model, "peft_config")


def _is_transformers(model: nn.Module) -> bool:
    return any(each.__name__ == "PreTrainedModel" for each in type(model).__mro__)


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers models in a module, none within another."""
    for child in model.children():
        if _is_transformers(child):
            yield child
        else:
            yield from _outermost(child)


def check_is_loaded(model: nn.Module) -> None:
    """Raise ValueError when weights are elsewhere until they are used, or were never loaded."""
    away = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    if away:
        raise ValueError(
            f"{len(away)} parameters of this {type(model).__name__} are offloaded or not loaded (device meta), "
            f"{away[0]} for one; load it whole, without a device_map that puts parts on cpu or disk"
        )


def parameters_of(model: nn.Module, forward: Callable[..., Any] | None = None) -> list[str]:
    """Names of the parameters of a model's forward call, in order.

    A ``forward`` that was replaced by one of ``*args`` hands them on: they are then named as those of the class.
    """
    named: list[str] = []
    for each in (forward or model.forward, _method_of(type(model).forward, model)):
        parameters = inspect.signature(each).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            break
    return named


def _method_of(function: Callable[..., Any], owner: nn.Module) -> Callable[..., Any]:
    """A function of a class as a method of one object."""
    bound: Callable[..., Any] = function.__get__(owner)
    return bound


@contextlib.contextmanager
def running_eagerly(model: nn.Module) -> Iterator[None]:
    """While the block runs, compiled parts of a model run eagerly: compiled code does not pass hooks added later."""
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            if module._compiled_call_impl is not None:
                undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
            if type(module).__name__ == "OptimizedModule":
                undo.callback(setattr, module, "forward", module.forward)
                module.forward = module.get_submodule("_orig_mod").__call__
        yield

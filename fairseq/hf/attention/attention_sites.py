"""The attentions of a Hugging Face model, and handlers that take them over without touching the model's code.

Models that call transformers' attention interface look a function up by the name in their config: while a handler has
taken over, the name is ours. MPT does not use the interface; its attention modules get another ``forward`` for a while.

Shapes: B rows, H query heads, G key-value heads, T queries, L local keys, D width.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fairseq.hf.hooks.patching import replace_forward
from fairseq.hf.hooks.protocols import KeyValueCache
from fairseq.memory.extended_mind.attention import LocalRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NAME = "extended_mind_"  # followed by the implementation it stands before
_MASKS: Mapping[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention: its inputs, its rules, and the model's own attention."""

    layer: int
    module: nn.Module
    query_BHTD: Tensor
    key_BGLD: Tensor
    value_BGLD: Tensor
    rule: LocalRule
    plain: Callable[[], tuple[Tensor, Tensor | None]]
    """The model's own attention: output (B, T, H, D) and weights or None."""
    sink_H: Tensor | None = None
    """Score of a place without value that every query sees."""
    slope_H: Tensor | None = None
    """ALiBi: how much a step to the left takes off a score."""
    first_B: Tensor | None = None
    """With ALiBi: column of the first local key that is no padding."""


class Handler(Protocol):
    """Takes over the attention of some layers."""

    def wants(self, layer: int) -> bool:
        """True where this layer is taken over in this call; otherwise the model's own code runs."""
        ...

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, H, D), and weights or None."""
        ...


_HANDLERS: WeakKeyDictionary[nn.Module, Handler] = WeakKeyDictionary()


def _own_attention(implementation: str, module: nn.Module) -> Callable[..., Any]:
    if implementation == "eager":
        eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dispatch(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that models call in place of their attention function, with its parameters."""
    own = _own_attention(implementation, module)
    handler, layer = _HANDLERS.get(module), getattr(module, "layer_idx", None)
    if handler is None or layer is None or not handler.wants(layer):
        own_result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
        return own_result
    query, key, value = _in_one_type(query, key, value)
    plain = functools.partial(own, module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias of its own to scores; it cannot take memories")
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout of {kwargs['dropout']} and memories do not go together; call model.eval()")
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    scale = kwargs.get("scaling")
    rule = LocalRule(
        mask_B1TL=attention_mask,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal and query.shape[2] > 1 and attention_mask is None,
        softcap=kwargs.get("softcap"),
    )
    return handler.attend(AttentionCall(layer, module, query, key, value, rule, plain, sink_H=kwargs.get("s_aux")))


def _in_one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's attention takes them under autocast, where a rotation leaves queries and keys in float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _register() -> None:
    for implementation, mask in _MASKS.items():
        AttentionInterface.register(_NAME + implementation, functools.partial(_dispatch, implementation))
        AttentionMaskInterface.register(_NAME + implementation, mask)


def check_still_taken_over(model: nn.Module) -> None:
    """Raise ValueError when the model was given another attention function in the meantime."""
    for config in _configs(model):
        if not str(config._attn_implementation_internal).startswith(_NAME):
            raise ValueError(
                f"the attention implementation of this {type(model).__name__} was set to "
                f"{config._attn_implementation_internal!r} while memories are attached, which takes them out; set it "
                "before you attach them"
            )


def _configs(model: nn.Module) -> list[Any]:
    found = [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


@contextlib.contextmanager
def taken_over(model: nn.Module, handler: Handler) -> Iterator[None]:
    """While the block runs, ``handler`` is asked about every attention of the model.

    Raises: ValueError when another handler has the model.
    """
    modules = [module for module in model.modules() if getattr(module, "layer_idx", None) is not None]
    if any(module in _HANDLERS for module in modules):
        raise ValueError(f"this {type(model).__name__} has memories attached already; detach them first")
    _register()
    configs = [(config, config._attn_implementation_internal) for config in _configs(model)]
    with contextlib.ExitStack() as undo:
        for module in modules:
            if type(module).__name__ == "MptAttention":
                undo.callback(replace_forward(module, functools.partial(_mpt_forward, module, module.forward)))
        for config, before in configs:
            undo.callback(setattr, config, "_attn_implementation_internal", before)
            config._attn_implementation_internal = _NAME + _base(before)
        for module in modules:
            undo.callback(_HANDLERS.pop, module, None)
            _HANDLERS[module] = handler
        yield


def _base(implementation: str | None) -> str:
    if implementation in _MASKS:
        return str(implementation)
    if implementation is None:
        return "eager"
    logger.warning("attention %r cannot be joined with memories: sdpa is used instead", implementation)
    return "sdpa"


@dataclass
class _Probe:
    """Sees which layers attend."""

    seen: dict[int, AttentionCall]

    def wants(self, layer: int) -> bool:
        return True

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.seen[call.layer] = call
        return call.plain()


@dataclass(frozen=True)
class Sites:
    """The attentions of a model."""

    modules: Mapping[int, nn.Module]
    """By number of the layer; layers without attention are not there."""
    num_layers: int
    has_alibi: bool


@torch.no_grad()
def find_sites(model: PreTrainedModel) -> Sites:
    """Run one token through the model to see where it attends.

    Raises: ValueError when the model is no decoder, or attends where nothing can be put between.
    """
    config = model.config
    name = f"{type(model).__name__} ({getattr(config, 'model_type', 'unknown')})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder and a decoder; memories inside attention are for decoders alone")
    probe = _Probe({})
    with taken_over(model, probe), evaluating(model):
        ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        model(input_ids=ids, use_cache=False)
    if not probe.seen:
        raise ValueError(
            f"{name} does not call transformers' attention interface, so memories cannot be put into it; models that "
            "do: Llama, Mistral, Qwen, Phi, Gemma, GPT-NeoX, OPT, GPT-2, and MPT without"
        )
    num_layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0)) or max(probe.seen) + 1
    has_alibi = any(call.slope_H is not None for call in probe.seen.values())
    return Sites({layer: call.module for layer, call in sorted(probe.seen.items())}, num_layers, has_alibi)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block runs."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _mpt_forward(
    module: Any,
    own_forward: Callable[..., Any],
    hidden_states: Tensor,
    position_bias: Tensor,
    cache: KeyValueCache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """MPT's attention, with its parameters, by way of the handler."""
    cache = kwargs.pop("past_key_values", cache)
    handler = _HANDLERS.get(module)
    if handler is None or not handler.wants(module.layer_idx):
        return own_forward(hidden_states, position_bias, cache=cache, attention_mask=attention_mask, **kwargs)  # type: ignore[no-any-return]
    if module.training and module.attn_dropout_p:
        raise ValueError(
            f"attention dropout of {module.attn_dropout_p} and memories exclude each other; call model.eval()"
        )
    joint = module.Wqkv(hidden_states)
    joint = joint.clamp(-module.clip_qkv, module.clip_qkv) if module.clip_qkv else joint
    query, key, value = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in joint.chunk(3, dim=-1))
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    length = key.shape[2]
    if length > position_bias.shape[-1]:
        raise ValueError(
            f"{length} tokens are more than the model's max_seq_len {position_bias.shape[-1]}; shorten them"
        )
    bias_BHTL = position_bias[None, :, :, -length:]
    first_B = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    if attention_mask is not None:  # true where a query must not look
        bias_BHTL = bias_BHTL.float().masked_fill(attention_mask[..., :length], -torch.inf)
        first_B = (~attention_mask[:, 0, -1, :length]).int().argmax(-1).expand(len(query))
    elif query.shape[2] > 1:
        late_TL = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).triu(
            length - query.shape[2] + 1
        )
        bias_BHTL = bias_BHTL.float().masked_fill(late_TL, -torch.inf)
    scale, slope_H = float(module.softmax_scale), position_bias[:, 0, -1] - position_bias[:, 0, -2]
    rule = LocalRule(bias_BHTL.to(query.dtype), scale)

    def plain() -> tuple[Tensor, Tensor | None]:
        from fairseq.memory.extended_mind.attention import local_attention

        return local_attention(query, key, value, rule).out_BHTD.transpose(1, 2), None

    call = AttentionCall(
        module.layer_idx, module, query, key, value, rule, plain, slope_H=slope_H.float(), first_B=first_B
    )
    out_BTHD, weights = handler.attend(call)
    return module.out_proj(out_BTHD.flatten(2)), weights

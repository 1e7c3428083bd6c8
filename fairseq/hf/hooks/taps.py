"""The places of memory keys in models: one line per architecture, and a search for those without a line.

A tap is a module and a side of it. ``last_ffn_input`` is what the feed-forward block of the last decoder layer reads
(after its layer norm in models that normalise first), ``last_ffn_output`` what it returns, before it is added to the
residual stream; ``final_hidden`` is what the output embedding reads, in any model. Layers without a module for the
block (OPT, BART) are tapped at its two linear maps. Of an encoder-decoder model only the decoder is searched; its block
comes after the cross-attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.seq2seq import decoder_path


@dataclass(frozen=True)
class FeedForward:
    """Dotted paths, from the model with its output embedding, to the last decoder layer's feed-forward block."""

    first: str
    """Module whose input is the block's; ``-1`` in a path is the last of a list."""
    last: str = ""
    """Module whose output is the block's, if it is another one."""


_BLOCK = FeedForward("model.layers.-1.mlp")
_LINEAR_PAIR = FeedForward("model.decoder.layers.-1.fc1", "model.decoder.layers.-1.fc2")

TAPS: dict[str, FeedForward] = {
    "gpt2": FeedForward("transformer.h.-1.mlp"),
    "gpt_neo": FeedForward("transformer.h.-1.mlp"),
    "gpt_neox": FeedForward("gpt_neox.layers.-1.mlp"),
    "opt": _LINEAR_PAIR,
    "llama": _BLOCK,
    "mistral": _BLOCK,
    "qwen2": _BLOCK,
    "qwen3": _BLOCK,
    "gemma": _BLOCK,
    "gemma2": _BLOCK,
    "gemma3_text": _BLOCK,
    "phi": _BLOCK,
    "phi3": _BLOCK,
    "bart": _LINEAR_PAIR,
    "marian": _LINEAR_PAIR,
    "mbart": _LINEAR_PAIR,
    "m2m_100": _LINEAR_PAIR,
    "t5": FeedForward("decoder.block.-1.layer.-1.DenseReluDense"),
}

# What the block is called in architectures that are searched, and the pairs of linear maps where it has no module.
_BLOCK_NAMES = ("mlp", "DenseReluDense", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward", "ff")
_PAIR_NAMES = (("fc1", "fc2"), ("fc_in", "fc_out"), ("linear1", "linear2"))
_NOT_DECODERS = ("encoder", "vision", "visual", "audio", "image", "speech")


@dataclass(frozen=True)
class Tap:
    """One side of a module of a model."""

    kind: KeyType
    path: str
    module: nn.Module
    takes_input: bool
    """The key is the module's input, rather than its output."""
    dim: int
    """Width of the keys."""


def find_tap(model: nn.Module, kind: KeyType) -> Tap:
    """The place of a model's keys of a kind.

    Args:
        model: a transformers model with an output embedding.
    Raises: ValueError naming what the model has when there is no such place.
    """
    if kind is KeyType.final_hidden:
        head = output_embedding(model)
        return Tap(kind, "output embedding", head, True, _in_features(head) or _hidden_size(model))
    block = TAPS.get(_model_type(model))
    if block is None or _at(model, block.first) is None:  # an unknown one, or a known one inside another model
        block = discover(model)
    takes_input = kind is KeyType.last_ffn_input
    path = block.first if takes_input else block.last or block.first
    module = _at(model, path)
    assert module is not None, path
    dim = _in_features(module) if takes_input else getattr(module, "out_features", None)
    return Tap(kind, path, module, takes_input, dim or _hidden_size(model))


def output_embedding(model: nn.Module) -> nn.Module:
    """The module that makes scores of the vocabulary. Raises: ValueError when the model has none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so it predicts no tokens; load the model with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    assert isinstance(head, nn.Module)
    return head


def discover(model: nn.Module) -> FeedForward:
    """The feed-forward block of the last layer of a decoder that has no line in ``TAPS``.

    Raises: ValueError naming the lists of layers the model has.
    """
    lists = list(_layer_lists(model))
    wanted = num_layers(model)
    fitting = [(path, block) for path, layers in lists if (block := _block_in(path, layers)) is not None]
    # Best a decoder's list of as many layers as the config states, then any list of so many, then any.
    by_length = [(path, block) for path, block in fitting if _length(model, path) == wanted]
    of_decoder = [(path, block) for path, block in by_length if "decoder" in path]
    for chosen in (of_decoder, by_length, fitting):
        if chosen:
            return chosen[0][1]
    found = "; ".join(f"{path} ({len(layers)} x {_children(layers[-1])})" for path, layers in lists) or "none"
    raise ValueError(
        f"no feed-forward block found in {type(model).__name__} (model type {_model_type(model)!r}); its lists of "
        f"layers: {found}. Take the key type final_hidden, which every model has, or add a line to TAPS in "
        "fairseq/hf/hooks/taps.py"
    )


def _layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of a model that may be a decoder's layers, those not within another list.

    Of an encoder-decoder model only those in its decoder, whatever its modules are called: an encoder of as many layers
    would do as well by the config.
    """
    decoder = decoder_path(model)
    for path, module in model.named_modules():
        if decoder is not None and not path.startswith(decoder + "."):
            continue
        words = (path if decoder is None else path.removeprefix(decoder + ".")).split(".")
        is_within_another = any(word.isdigit() for word in words)
        is_other_tower = decoder is None and any(_is_of_other_tower(word) for word in words)
        if isinstance(module, nn.ModuleList) and len(module) and not is_within_another and not is_other_tower:
            yield path, module


def _is_of_other_tower(word: str) -> bool:
    return "decoder" not in word and any(mark in word for mark in _NOT_DECODERS)


def _block_in(path: str, layers: nn.ModuleList) -> FeedForward | None:
    """The block of the last layer, or of the last of its sub-layers, by the names that are in use."""
    last = layers[-1]
    at = f"{path}.-1"
    for name in _BLOCK_NAMES:
        if isinstance(getattr(last, name, None), nn.Module):
            return FeedForward(f"{at}.{name}")
    for first, second in _PAIR_NAMES:
        if isinstance(getattr(last, first, None), nn.Module) and isinstance(getattr(last, second, None), nn.Module):
            return FeedForward(f"{at}.{first}", f"{at}.{second}")
    for name, child in last.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            inner = _block_in(f"{at}.{name}", child)
            if inner is not None:
                return inner
    return None


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where there is none."""
    module: Any = model
    for word in path.split("."):
        if word == "-1":
            module = module[-1] if isinstance(module, nn.ModuleList) and len(module) else None
        else:
            module = getattr(module, word, None)
        if not isinstance(module, nn.Module):
            return None
    found: nn.Module = module
    return found


def _length(model: nn.Module, path: str) -> int:
    layers = _at(model, path)
    return len(layers) if isinstance(layers, nn.ModuleList) else 0


def _children(module: nn.Module) -> str:
    return f"{type(module).__name__}: {', '.join(name for name, _ in module.named_children()) or 'no parts'}"


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _model_type(model: nn.Module) -> str:
    return str(getattr(model.config, "model_type", ""))


def num_layers(model: nn.Module) -> int | None:
    """Decoder layers by the model's config; None where the config has no such field."""
    return LayerField.of(model).num_layers


class LayerField(NamedTuple):
    """The field of a model's config that says how many decoder layers run."""

    config: Any
    """The model's."""
    text_config: Any
    """Its part for text."""
    name: str | None

    @classmethod
    def of(cls, model: nn.Module) -> LayerField:
        """Find it: takes longer than many a small operation of a step of generation."""
        config = _text_config(model)
        names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
        found = (name for name in names if isinstance(getattr(config, name, None), int))
        return cls(model.config, config, next(found, None))

    @property
    def num_layers(self) -> int | None:
        """Its value; None where there is none."""
        return None if self.name is None else int(getattr(self.text_config, self.name))


def _hidden_size(model: nn.Module) -> int:
    return int(_text_config(model).hidden_size)


def _in_features(module: nn.Module) -> int | None:
    return module.in_features if isinstance(module, nn.Linear) else None

"""Models with memories in the way of the Extended Mind models: given when loading, exchanged by assignment.

    model = from_pretrained("path/to/model", external_memories=tokenizer(text).input_ids)
    model.generate(inputs, max_length=40, topk=2)
    model.clear_memories()
    model.memory_ids = other_token_ids

Any decoder that ``ExtendedMind`` takes can be loaded so, and configs of the original's models are understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from fairseq.hf.attention.build import MemorySource, input_vocabulary
from fairseq.hf.attention.wrapper import ExtendedMind
from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.settings import MindSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = {field.name for field in fields(MindSettings)} | {"remove_special_tokens"}
_PREFIX = "extended-"  # of the original's model types


class MindInterface(nn.Module):
    """The members of a model with memories beside its own."""

    mind: ExtendedMind

    @property
    def memory_ids(self) -> Any:
        """Token ids of the memories; None without. Other ids are read at the next call."""
        mind: ExtendedMind = self.__dict__["mind"]
        return mind.source

    @memory_ids.setter
    def memory_ids(self, source: MemorySource | None) -> None:
        mind: ExtendedMind = self.__dict__["mind"]
        mind.set_memory_later(source)

    @property
    def memories(self) -> tuple[Memory, ...] | None:
        """The memories as far as they have been made; None without."""
        mind: ExtendedMind = self.__dict__["mind"]
        return mind.memories or None

    def clear_memories(self) -> None:
        """Forget everything."""
        mind: ExtendedMind = self.__dict__["mind"]
        mind.clear_memories()

    clear_memory = clear_memories

    def generate_cache(
        self, input_ids: MemorySource, stride: int | None = None, max_len: int | None = None
    ) -> tuple[Memory, ...]:
        """Make memories now, in windows of another stride and length than the settings say; returns them."""
        mind: ExtendedMind = self.__dict__["mind"]
        mind.set_memory(input_ids, settings=mind.settings.with_changes(stride=stride, max_len=max_len))
        return mind.memories


def from_pretrained(
    name: str,
    *,
    external_memories: MemorySource | None = None,
    memory_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    **kwargs: Any,
) -> Any:
    """Load a decoder with memories attached for good: the interface of the Extended Mind models.

    ``model.memory_ids = ids`` replaces the memories, ``model.clear_memories()`` removes them.

    Args:
        name: folder or name for ``AutoModelForCausalLM``.
        external_memories: token ids (or whatever ``ExtendedMind`` takes), read at the first call.
        memory_config: settings, or a part of them. Settings may be given by name too; these take precedence.
        tokenizer: for memories of text.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``.

    ```python
    model.save_pretrained("tiny-gpt2")
    loaded = from_pretrained("tiny-gpt2", external_memories=[3, 1, 4, 1, 5, 9], topk=2)
    loaded.generate(ids_BT[:1, :4], max_new_tokens=4, pad_token_id=0)
    ```
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

    named = {key: kwargs.pop(key) for key in list(kwargs) if key in SETTINGS}
    kwargs.pop("trust_remote_code", None)  # none of the model's own code is needed
    stored: dict[str, Any] = {}
    if "config" not in kwargs:
        model_config, _ = PreTrainedConfig.get_config_dict(name)
        stored = _stored_settings(model_config)
        kind = str(model_config.get("model_type", ""))
        if kind.startswith(_PREFIX):
            kwargs["config"] = CONFIG_MAPPING[kind.removeprefix(_PREFIX)].from_dict(_without_prefix(model_config))
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    return with_memories(model, external_memories, stored | dict(memory_config or {}) | named, tokenizer=tokenizer)


def with_memories(
    model: PreTrainedModel,
    external_memories: MemorySource | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> PreTrainedModel:
    """Give a loaded model memories, and the members of ``MindInterface``, for good.

    Settings that ``config`` lacks have the defaults of the original's model of that kind.
    """
    settings = default_settings(model) | dict(config or {})
    mind = ExtendedMind(model, tokenizer=tokenizer, config=settings)
    own = type(model)
    # Of the same name, so that the model saves itself as what it is.
    model.__class__ = type(own.__name__, (MindInterface, own), {"__module__": own.__module__})
    model.__dict__["mind"] = mind
    mind.attach()
    mind.set_memory_later(external_memories)
    return model


def default_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The original's defaults, which differ between MPT and the others."""
    config = model.config
    vocabulary = input_vocabulary(model)
    if config.model_type == "mpt":
        special, others = [0, 50278], {"mask_by_sim": True, "remove_special_ids": False}
    else:
        named = [0, config.bos_token_id, config.eos_token_id]
        special = [number for each in named for number in (each if isinstance(each, list) else [each])]
        others = {"mask_by_sim": False, "remove_special_ids": True}
    special = [number for number in special if number is not None and number < vocabulary]
    return {"tokenizer_all_special_ids": list(dict.fromkeys(special)), **others}


def _stored_settings(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in a model's config: Llama's in a mapping of their own, MPT's among those of its attention."""
    stored = dict(model_config.get("memory_config") or {})
    stored |= {key: value for key, value in (model_config.get("attn_config") or {}).items() if key in SETTINGS}
    if "use_external_mind" in model_config:
        stored["use_external_mind"] = model_config["use_external_mind"]
    by_layer, depth = (
        stored.get("use_external_mind_by_layer"),
        model_config.get("n_layers") or model_config.get("num_hidden_layers"),
    )
    if by_layer is not None and depth and len(by_layer) > depth:
        stored["use_external_mind_by_layer"] = by_layer[:depth]  # MPT's default has 32 entries whatever the depth
    return stored


def _without_prefix(model_config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in model_config.items() if key not in ("memory_config", "auto_map")}
    plain["model_type"] = plain["model_type"].removeprefix(_PREFIX)
    if "max_seq_len_inference" in plain:
        plain.setdefault("max_seq_len", plain.pop("max_seq_len_inference"))
    if isinstance(plain.get("attn_config"), dict):
        plain["attn_config"] = {key: value for key, value in plain["attn_config"].items() if key not in SETTINGS}
    return plain

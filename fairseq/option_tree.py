"""The options of train.py as a tree, which YAML files and Hydra have: sections, and in each the fields of configs.

One source: sections are made of the configs that make the flags, and a tree is turned into flags to be read.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairseq.config import build, flag_names
from fairseq.config.flags import negative_name
from fairseq.criterions import CRITERIONS
from fairseq.data.batching_config import BatchingConfig, DatasetConfig
from fairseq.models.architectures import ARCHITECTURES, build_model_config, model_config_class, model_name
from fairseq.optim import LR_SCHEDULERS, OPTIMIZERS
from fairseq.optim.configs import EmaConfig, OptimizationConfig
from fairseq.options import ChoicesConfig, Settings, task_for
from fairseq.registry import did_you_mean, lookup
from fairseq.runtime.config import CommonConfig, DistributedConfig, RuntimeConfig
from fairseq.tasks import TASKS
from fairseq.training.config import CheckpointConfig, ValidationConfig

NAME = "_name"
"""Key of a chosen part's name in its section, as in fairseq."""

FIXED: Mapping[str, tuple[type, ...]] = {
    "dataset": (DatasetConfig, BatchingConfig, ValidationConfig),
    "distributed_training": (DistributedConfig,),
    "optimization": (OptimizationConfig,),
    "ema": (EmaConfig,),
    "checkpoint": (CheckpointConfig,),
    "common": (RuntimeConfig, CommonConfig),
}
"""Sections of which there is one kind."""

_CHOICES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "task": ("task", TASKS),
    "model": ("arch", ARCHITECTURES),
    "criterion": ("criterion", CRITERIONS),
    "optimizer": ("optimizer", OPTIMIZERS),
    "lr_scheduler": ("lr_scheduler", LR_SCHEDULERS),
}
CHOSEN = tuple(_CHOICES)
"""Sections that are chosen by name."""


@dataclass(frozen=True)
class Section:
    """The fields of a section."""

    fields: Mapping[str, dataclasses.Field[Any]]
    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]
    """Value of each field that the user need not give."""

    @classmethod
    def of(cls, configs: Sequence[type], defaults: Mapping[str, Any] | None = None) -> Section:
        """The section of some configs; ``defaults`` replaces those of their fields."""
        found = {field.name: field for config in configs for field in dataclasses.fields(config)}
        hints = {name: hint for config in configs for name, hint in typing.get_type_hints(config).items()}
        usual = {name: f.default for name, f in found.items() if f.default is not dataclasses.MISSING}
        return cls(found, hints, usual | dict(defaults or {}))


def names_of(section: str) -> list[str]:
    """Names that a chosen section may have."""
    return sorted(_CHOICES[section][1])


def section_of(section: str, name: str | None = None) -> Section:
    """A section; of a chosen one, that of a name. Raises: ValueError for an unknown name."""
    if section in FIXED:
        return Section.of(FIXED[section])
    _, table = _CHOICES[section]
    entry = lookup(table, str(name), section)
    if section != "model":
        return Section.of((entry.config,))
    kind = model_config_class(model_name(str(name)))
    return Section.of((kind,), dataclasses.asdict(build_model_config(str(name), {})))


def default_names() -> dict[str, str]:
    """The name of each chosen section that has none."""
    usual = build(ChoicesConfig, {})
    return {section: getattr(usual, field) for section, (field, _) in _CHOICES.items()}


def plain_tree(section: str, name: str | None = None) -> dict[str, Any]:
    """A section with its defaults as plain types; ``???``, as OmegaConf writes it, where a value must be given."""
    here = section_of(section, name)
    tree = {key: _plain(here.defaults.get(key, "???")) for key in here.fields}
    return tree if name is None else {NAME: name} | tree


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def tree_of(settings: Settings) -> dict[str, dict[str, Any]]:
    """What a command line gave, as a tree: its flags, and the names of all chosen parts."""
    tree: dict[str, dict[str, Any]] = {}
    for section in (*CHOSEN, *FIXED):
        name = settings.chosen[_CHOICES[section][0]] if section in _CHOICES else None
        keys = section_of(section, name).fields
        here = {} if name is None else {NAME: name}
        here |= {key: _plain(settings.given[key]) for key in keys if key in settings.given}
        if here:
            tree[section] = here
    return tree


def words_of(tree: Mapping[str, Any]) -> list[str]:
    """The arguments of train.py that mean a tree: values other than the defaults.

    Raises: ValueError with the path of a key that is unknown, misplaced or missing.
    """
    names = default_names()
    for section, values in tree.items():
        require_section(section)
        if not isinstance(values, Mapping):
            raise ValueError(f"{section}: {values!r} is no section; give its keys below it")
        if section in names and NAME in values:
            names[section] = str(values[NAME])
    if NAME not in tree.get("task", {}):
        names["task"] = task_for(names["model"], names["task"])
    words = [f"--{_CHOICES[section][0].replace('_', '-')}={names[section]}" for section in CHOSEN]
    for section, values in tree.items():
        here = section_of(section, names.get(section))
        for key, value in values.items():
            if key == NAME:
                continue
            require_key(section, key, [names])
            words += _words_of_field(f"{section}.{key}", here.fields[key], value, here)
    return words


def require_section(section: str) -> None:
    """Raise ValueError with the nearest name for a section that does not exist."""
    if section not in (*CHOSEN, *FIXED):
        raise ValueError(f"unknown section {section}{did_you_mean(section, (*CHOSEN, *FIXED))}")


def require_key(section: str, key: str, choices: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError, with the right section or the nearest name, for a key that a section has by no choice of names.

    Args:
        choices: names of the chosen sections; several in a sweep over names.
    """
    if any(key in section_of(section, names.get(section)).fields for names in choices):
        return
    names = choices[0]
    for other in (*FIXED, *CHOSEN):
        if key in section_of(other, names.get(other)).fields:
            raise ValueError(f"unknown key {section}.{key}; it belongs to {other}.{key}")
    of = f" of {names[section]}" if section in names else ""
    hint = did_you_mean(key, section_of(section, names.get(section)).fields)
    raise ValueError(f"unknown key {section}.{key}{of}{hint}")


def _words_of_field(path: str, field: dataclasses.Field[Any], value: Any, section: Section) -> Iterator[str]:
    """The flag that gives a value, unless it is the default."""
    if value == "???":
        raise ValueError(f"{path} is ??? and must be given")
    default = section.defaults.get(field.name, dataclasses.MISSING)
    if value == _plain(default) or (value is not None and _as_text(value) == _as_text(_plain(default))):
        return
    if value is None:
        raise ValueError(f"{path}: null; its default is {default!r}, give a value")
    name = flag_names(field)[0]
    if section.hints[field.name] is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {value!r} is neither true nor false")
        if not value and not field.metadata.get("negatable"):
            raise ValueError(f"{path}: the {default!r} of this name cannot be turned off; choose another one")
        yield name if value else negative_name(name)
    elif not name.startswith("-"):
        yield _as_text(value)
    elif section.hints[field.name] == tuple[str, ...] and isinstance(value, Sequence) and not isinstance(value, str):
        yield from (name, *map(str, value))
    else:
        yield f"{name}={_as_text(value)}"


def _as_text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return repr(dict(value)) if isinstance(value, Mapping) else str(value)

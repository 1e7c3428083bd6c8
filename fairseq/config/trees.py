"""Frozen dataclasses from nested mappings, as YAML files have them; mistakes are named by the path of their key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from fairseq.config.flags import field_help
from fairseq.registry import did_you_mean

C = TypeVar("C")
_MISSING = "???"  # as OmegaConf writes a value that must be given
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def keyed(key: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field whose key in a file is no name in Python, such as ``lambda``."""
    return dataclasses.field(default=default, metadata={"key": key})


def build_tree(kind: type[C], tree: Mapping[str, Any]) -> C:
    """Make a dataclass whose fields may be dataclasses from a mapping; what it lacks has its default.

    Raises: ValueError with the path of a key that is unknown (with its section, or the nearest name), missing or of
        another type; and from the classes' own checks.
    """
    known = dict(leaves(kind))
    return _build(kind, tree, "", known)


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and help of every key."""
    helps, hints = field_help(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path = prefix + _key(field)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(typing.cast(type, hints[field.name]), f"{path}.")
        else:
            yield path, helps.get(field.name, "")


def plain_tree(config: Any) -> dict[str, Any]:
    """A config as nested plain types, by the keys of its files."""
    values = ((_key(field), getattr(config, field.name)) for field in dataclasses.fields(config))
    return {
        key: plain_tree(value) if dataclasses.is_dataclass(value) else list(value) if type(value) is tuple else value
        for key, value in values
    }


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _build(kind: type[C], tree: Any, path: str, known: Mapping[str, str]) -> C:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.rstrip('.')}: {tree!r} is no section; give its keys below it")
    fields = {_key(field): field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ValueError(f"unknown key {path}{key}{_hint(path, str(key), list(fields), known)}")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, field in fields.items():
        here, hint = path + key, hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = _build(typing.cast(type, hint), tree.get(key), f"{here}.", known)
        elif key in tree and tree[key] != _MISSING:
            values[field.name] = _value(here, hint, tree[key])
        elif field.default is dataclasses.MISSING or key in tree:
            raise ValueError(f"{here} is missing; write it into the config, or give {here}=VALUE")
    return kind(**values)


def _hint(path: str, key: str, here: list[str], known: Mapping[str, str]) -> str:
    elsewhere = next((other for other in known if other.rpartition(".")[2] == key), None)
    if elsewhere is not None:
        return f"; it belongs to {elsewhere}"
    if path or did_you_mean(key, here):
        return did_you_mean(key, here)
    return did_you_mean(key, [other.rpartition(".")[2] for other in known])


def _value(path: str, hint: Any, value: Any) -> Any:
    """A value of a field's type. Raises: ValueError when it is of another one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{path}: {value!r} is not a list of texts, such as [a, b]")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}: {value!r} is not {_NAMES[hint]}")
    return value

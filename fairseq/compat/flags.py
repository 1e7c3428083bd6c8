"""Options of plug-ins in fairseq's form, as configs: what ``add_args(parser)`` adds, or a ``FairseqDataclass``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from fairseq.config import FlagParser, Namespace, flag


@dataclasses.dataclass
class FairseqDataclass:
    """Options of a part; the metadata ``help`` of a field is its help text."""

    is_fairseq_dataclass: typing.ClassVar[bool] = True


class StrEnum(str, Enum):
    """An enumeration whose members are their texts."""

    def __str__(self) -> str:
        return str(self.value)


def ChoiceEnum(choices: Sequence[str]) -> Any:  # noqa: N802  fairseq's name
    """A type whose values are these texts."""
    return Enum("Choices", {choice: choice for choice in choices}, type=StrEnum)


def gen_parser_from_dataclass(parser: FlagParser, dataclass_instance: Any, delete_default: bool = False) -> None:
    """Add the options of a dataclass to a parser."""
    for name, kind, field in _fields_of(type(dataclass_instance)):
        settings = field.metadata
        named = settings["names"] or ("--" + name.replace("_", "-"),)
        more: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": settings["parse"] or kind}
        parser.add_argument(*named, dest=name, help=settings["help"] or None, **more)
        if not delete_default:
            parser.set_defaults(**{name: None if field.default is dataclasses.MISSING else field.default})


class ArgumentRecorder:
    """Stands for argparse's parser: notes what ``add_args`` adds, as fields of a config."""

    def __init__(self) -> None:
        self.fields: list[tuple[str, Any, Any]] = []

    def add_argument(self, *names: str, **settings: Any) -> None:
        """As argparse's, for options with one value, several values, or none.

        Raises: ValueError for an action that switches nothing on.
        """
        action = settings.get("action", "store")
        if action not in ("store", "store_true") or not names[0].startswith("-"):
            raise ValueError(
                f"add_args: {names[0]} is no option of action store or store_true; declare it as one of these"
            )
        longest = max(names, key=lambda name: name.startswith("--"))
        name = settings.get("dest") or longest.lstrip("-").replace("-", "_")
        default, text = settings.get("default"), settings.get("help") or ""
        if action == "store_true":
            self.fields.append((name, bool, flag(*names, default=bool(default), help=text)))
            return
        parse = settings.get("type", str)
        if settings.get("nargs") in ("+", "*") or isinstance(settings.get("nargs"), int):
            self.fields.append((name, tuple[str, ...], flag(*names, default=default, help=text)))
            return
        choices = settings.get("choices")
        self.fields.append((name, Any, flag(*names, default=default, choices=choices, parse=parse, help=text)))

    def add_argument_group(self, *names: str, **settings: Any) -> ArgumentRecorder:
        """Groups are shown by part here."""
        return self

    def set_defaults(self, **values: Any) -> None:
        """Raises: ValueError; a default belongs to its option."""
        raise ValueError("add_args: set_defaults is not offered; give each option its default")


def config_of(part: Any, dataclass: type | None, base: type | None = None) -> type:
    """The config with the options of a class in fairseq's form.

    Args:
        part: a class that may have ``add_args(parser)``.
        dataclass: its ``FairseqDataclass``, if it has one; it then counts alone, as in fairseq.
        base: config whose options every part of this kind has.
    """
    found = _fields_of(dataclass) if dataclass is not None else _added_by(part)
    own = {field.name for field in dataclasses.fields(base)} if base is not None else set()
    kept = [field for field in found if field[0] not in own]
    bases = (base,) if base is not None else ()
    made: type = dataclasses.make_dataclass(f"{part.__name__}Options", kept, bases=bases, frozen=True, kw_only=True)
    made.__module__ = __name__  # where the names in its annotations are looked up
    return made


def _added_by(part: Any) -> list[tuple[str, Any, Any]]:
    recorder = ArgumentRecorder()
    add: Callable[[Any], None] | None = getattr(part, "add_args", None)
    if add is not None:
        add(recorder)
    return recorder.fields


def _fields_of(dataclass: type) -> list[tuple[str, Any, Any]]:
    """The fields of a FairseqDataclass as fields of a config; values that come from other parts are left out."""
    hints, found = typing.get_type_hints(dataclass), []
    for field in dataclasses.fields(dataclass):
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, str) and default.startswith("${"):  # omegaconf's II("optimization.lr")
            continue
        kind = hints[field.name]
        more: dict[str, Any] = {"choices": [member.value for member in kind]} if _is_enum(kind) else {}
        spelling = "--" + field.name.replace("_", "-")
        alias = field.metadata.get("argparse_alias")
        text = field.metadata.get("help", "")
        default = None if default is dataclasses.MISSING or default == "???" else default
        made = flag(spelling, *([alias] if alias else []), default=default, help=text, **more)
        found.append((field.name, str if _is_enum(kind) else kind, made))
    return found


def _is_enum(kind: type[Any]) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def namespace(config: Any, **more: object) -> Namespace:
    """A config as the mutable ``args`` or ``cfg`` of fairseq's parts."""
    values: Mapping[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Namespace(**{**values, **more})

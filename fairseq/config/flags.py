"""Frozen dataclasses <-> command-line flags. This is the only module that knows argparse.

A part of the program declares what can be set about it as a frozen, keyword-only dataclass whose fields are made by
:func:`flag`; the string under a field is its help text. :class:`FlagParser` turns such classes into flags, and
:func:`build` turns what the user gave back into an instance (which checks itself in ``__post_init__``).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import numbers
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from fairseq.registry import did_you_mean

C = TypeVar("C")
Namespace = argparse.Namespace


def flag(
    *names: str,
    default: object = dataclasses.MISSING,
    choices: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    const: object = None,
    negatable: bool = False,
    help: str = "",
) -> Any:
    """Declare a config field that is also a flag.

    Args:
        names: spellings as fairseq users know them, the first one shown in help; without any, ``--field-name``.
            A name without leading dashes makes a positional argument.
        default: the field's value when the user says nothing.
        choices: the permitted values.
        parse: turns the flag's text into the value; by default the field's annotation decides.
        const: makes the flag's value optional: given without a value it means ``const``.
        help: help text of a field without a string under it, such as one that a plug-in's parser declares.
        negatable: a switch that is on by default, or in some named architecture: ``--no-NAME`` turns it off.
    """
    metadata = {"names": names, "choices": choices, "parse": parse, "const": const, "negatable": negatable}
    metadata["help"] = help
    return dataclasses.field(default=default, metadata=metadata)


class UnreadableError(argparse.ArgumentTypeError, ValueError):
    """A flag's text that cannot be read; argparse shows the message of this one."""


def int_list(text: str) -> tuple[int, ...]:
    """Parse ``20000,60000``. Raises: UnreadableError when it is anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UnreadableError(f"{text!r} is not a comma-separated list of integers (for example 20000,60000)") from None


def float_list(text: str) -> tuple[float, ...]:
    """Parse ``0.1,0.2`` or a literal such as ``(0.9, 0.98)``; never evaluates code. Raises: as int_list."""
    try:
        return tuple(float(part) for part in text.strip("()[] ").removesuffix(",").split(","))
    except ValueError:
        raise UnreadableError(f"{text!r} is not a comma-separated list of numbers (for example 0.1,0.2)") from None


LARGEST_COUNT = 2**31 - 1
"""Largest whole number that a count may be: it still fits what tensors and C libraries count with."""


def require_at_least(limit: float, *, between: str = "-", hint: str = "", **values: float | None) -> None:
    """Raise ValueError for a value below the limit (or NaN), named as its flag; None is no value.

    Args:
        between: separator in the flags' names, ``-`` or ``_``.
        hint: what the message ends with.
    """
    require_within(limit, math.inf, between=between, hint=hint, **values)


def require_within(low: float, high: float, *, between: str = "-", hint: str = "", **values: float | None) -> None:
    """Raise ValueError for a value outside of two limits (or NaN, or no number); otherwise as ``require_at_least``."""
    for name, value in values.items():
        if value is None:
            continue
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if is_number and low <= value <= high:
            continue
        bound = f"at most {high}" if is_number and value > high else f"at least {low}"
        spelling = "--" + name.replace("_", between)
        raise ValueError(f"{spelling} must be {bound}, got {value}{'; ' if hint else ''}{hint}")


def literal_dict(text: str) -> dict[str, Any]:
    """Parse a dictionary literal such as ``{'dropout': 0.1}``; never evaluates code.

    Raises: UnreadableError when it is anything else.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise UnreadableError(f"{text!r} is not a literal such as \"{{'dropout': 0.1}}\"") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{text!r} is a {type(value).__name__}, a dictionary is needed")
    if not all(isinstance(key, str) for key in value):
        raise UnreadableError(f"{text!r} has keys that are no names; give settings such as \"{{'dropout': 0.1}}\"")
    return value


_PARSERS: dict[Any, Callable[[str], Any]] = {
    tuple[int, ...]: int_list,
    tuple[float, ...]: float_list,
    dict[str, Any]: literal_dict,
}


def _value_parser(annotation: Any) -> Callable[[str], Any]:
    """The function that reads a value of this annotation from text; ``X | None`` reads as ``X``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    parser: Callable[[str], Any] = _PARSERS.get(annotation, annotation)
    return parser


def flag_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The spellings of a field's flag."""
    return tuple(field.metadata.get("names") or ()) or ("--" + field.name.replace("_", "-"),)


def negative_name(name: str) -> str:
    """The flag that turns a switch off: ``--no-x`` for ``--x``, and ``--x`` for ``--no-x``."""
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else "--no-" + name.removeprefix("--")


def require_shard(shard_id: int, num_shards: int) -> None:
    """Raise ValueError unless --shard-id is one of --num-shards parts."""
    require_at_least(1, num_shards=num_shards)
    if not 0 <= shard_id < num_shards:
        raise ValueError(f"--shard-id {shard_id} is not in 0..{num_shards - 1} (--num-shards)")


def shard_suffix(shard_id: int, num_shards: int) -> str:
    """Part of the names of a shard's files, such as ``.shard0of4``; empty where there is one shard."""
    return f".shard{shard_id}of{num_shards}" if num_shards > 1 else ""


def in_python(message: str) -> str:
    """A command's message with the names of Python's arguments for those of flags: ``k=3`` for ``--k 3``."""
    message = re.sub(r"--([\w-]+) (\d+|FILE)\b", lambda hit: f"{hit[1].replace('-', '_')}={hit[2]}", message)
    return re.sub(r"--([\w-]+)", lambda hit: hit[1].replace("-", "_"), message)


def field_help(config_class: type) -> dict[str, str]:
    """Field name -> the string written under it, for every field that has one (parents included)."""
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError):  # no source at hand, e.g. a class made in an interactive session
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in zip(body, body[1:]):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def build(config_class: type[C], given: Mapping[str, Any], **more: object) -> C:
    """Make a config from the values the user gave (others keep their defaults); ``more`` wins over both.

    Raises: ValueError from the class's own checks, or when a value without default is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    values = {name: given[name] for name in fields if name in given} | more
    missing = [flag_names(f)[0] for f in fields.values() if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return config_class(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain types (for checkpoints and manifests); tuples become lists."""
    plain = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


_IGNORED = "ignored "


class _Flag(argparse.Action):
    """A switch that is present only if it was given; unlike store_true it sets no default."""

    value = True

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs | {"default": argparse.SUPPRESS})

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self.value)


class _NegativeFlag(_Flag):
    """A switch that turns another one off."""

    value = False


class FlagParser(argparse.ArgumentParser):
    """Reads flags in fairseq's spelling (dashes or underscores) and reports a mistake in one line.

    What the user did not give is absent from the result, so that architecture and checkpoint defaults can fill it.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._spellings: dict[str, str] = {}
        self._help_wanted = any(word in ("-h", "--help") for word in sys.argv[1:])

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_config(self, config_class: type, title: str | None = None) -> None:
        """Add a flag for each field of a config; a flag that is there already (same names) is shared."""
        group = self.add_argument_group(title or config_class.__name__)
        hints = typing.get_type_hints(config_class)
        helps = field_help(config_class) if self._help_wanted else {}
        for field in dataclasses.fields(config_class):
            names = flag_names(field)
            if self._normal(names[0]) not in self._spellings:
                text = helps.get(field.name) or field.metadata.get("help", "")
                self._add_flag(group, field, names, hints[field.name], text)

    def _add_flag(
        self,
        group: argparse._ArgumentGroup,
        field: dataclasses.Field[Any],
        names: tuple[str, ...],
        annotation: Any,
        text: str,
    ) -> None:
        shown = field.default
        if shown is not dataclasses.MISSING and shown is not None and shown is not False and text:
            text = f"{text} (default: {shown})"
        settings: dict[str, Any] = {"help": text.replace("%", "%%") or None}
        if field.metadata.get("choices"):
            settings["choices"] = list(field.metadata["choices"])
        if not names[0].startswith("-"):
            optional = field.default is not dataclasses.MISSING
            several = annotation == tuple[str, ...]
            kind = str if several else _value_parser(annotation)
            group.add_argument(names[0], type=kind, nargs="*" if several else "?" if optional else None, **settings)
            self._spellings[names[0]] = names[0]
            return
        for name in names:
            self._spellings[self._normal(name)] = name
        if annotation is bool:
            group.add_argument(*names, dest=field.name, action=_Flag, **settings)
            if field.metadata.get("negatable"):
                negative = negative_name(names[0])
                self._spellings[self._normal(negative)] = negative
                group.add_argument(negative, dest=field.name, action=_NegativeFlag, help=f"Turns {names[0]} off.")
            return
        settings["type"] = field.metadata.get("parse") or _value_parser(annotation)
        if field.metadata.get("const") is not None:
            settings |= {"nargs": "?", "const": field.metadata["const"]}
        if annotation == tuple[str, ...]:
            settings |= {"type": str, "nargs": "+", "action": "extend"}  # given twice, the flag adds to its values
        if "choices" not in settings:
            settings["metavar"] = field.name.upper()
        group.add_argument(*names, dest=field.name, **settings)

    def parse(self, argv: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Parse a command line into {field: value}, holding only what was given.

        Args:
            elsewhere: flags that exist but not for this choice of parts -> why, for the message.
        Exits with status 2 and one line on a mistake.
        """
        namespace, unknown = self.parse_known_args(self.respell(argv))
        if unknown:
            self.error(self._explain(unknown[0].partition("=")[0], elsewhere or {}))
        return vars(namespace)

    def peek(self, argv: Sequence[str]) -> dict[str, Any]:
        """Read the flags this parser knows and pass over all others; used to learn which parts were chosen."""
        words = [word for word in self.respell(argv) if word not in ("-h", "--help")]
        return vars(self.parse_known_args(words)[0])

    def add_ignored(self, name: str, *, takes_value: bool) -> None:
        """Accept a flag that sets nothing, unless a config has it; :meth:`pop_ignored` returns those given."""
        if self._normal(name) in self._spellings:
            return
        self._spellings[self._normal(name)] = name
        settings: dict[str, Any] = {} if takes_value else {"action": _Flag}
        self.add_argument(name, dest=_IGNORED + name, help=argparse.SUPPRESS, **settings)

    def pop_ignored(self, given: dict[str, Any]) -> list[str]:
        """Take the ignored flags out of what :meth:`parse` returned; returns their names."""
        names = [key.removeprefix(_IGNORED) for key in given if key.startswith(_IGNORED)]
        for name in names:
            del given[_IGNORED + name]
        return names

    def respell(self, argv: Sequence[str]) -> list[str]:
        """Rewrite each flag of ``argv`` to its declared spelling: dashes and underscores both work."""
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            known = self._spellings.get(self._normal(name)) if name.startswith("--") else None
            words.append((known or name) + equals + value)
        return words

    def spellings(self) -> Iterable[str]:
        """Every flag this parser knows."""
        return self._spellings.values()

    def _explain(self, word: str, elsewhere: Mapping[str, str]) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        for name, reason in elsewhere.items():
            if self._normal(name) == self._normal(word):
                return f"{word} {reason}"
        return f"unknown flag {word}{did_you_mean(word, [*self._spellings.values(), *elsewhere])}"

    @staticmethod
    def _normal(name: str) -> str:
        return name.replace("_", "-") if name.startswith("--") else name

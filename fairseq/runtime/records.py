"""The one reader of JSON files that stand beside data: a schema is compared before any value is used.

A file that is damaged, or that somebody made up, ends in a ValueError that names the file, the entry and the way out.

```python
RECORD = Fields({"rows": WHOLE, "key_dtype": one_of("float32", "float16")}, {"deleted": WHOLE})
content = read_record(Path("store.json"), RECORD)
```
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fairseq.runtime.files import BLOCK_BYTES, DAMAGED, read_json


class Kind(Protocol):
    """What a value has to be."""

    def faults(self, value: object, where: str) -> Iterator[str]:
        """Yield a clause for each thing that is wrong, such as ``'rows' is -1, not a whole number``."""
        ...


@dataclass(frozen=True)
class Scalar:
    """A value that a test accepts."""

    name: str
    """As messages say it: "a text"."""
    accepts: Callable[[Any], bool]

    def faults(self, value: object, where: str) -> Iterator[str]:
        """As Kind says."""
        if not self.accepts(value):
            yield f"{where!r} is {_short(value)}, not {self.name}"


@dataclass(frozen=True)
class Items:
    """A list whose items are all of one kind."""

    kind: Kind
    at_least: int = 0

    def faults(self, value: object, where: str) -> Iterator[str]:
        """As Kind says."""
        if not isinstance(value, list) or len(value) < self.at_least:
            yield f"{where!r} is {_short(value)}, not a list" + (" with entries" if self.at_least else "")
            return
        for number, item in enumerate(value):
            yield from self.kind.faults(item, f"{where}[{number}]")


@dataclass(frozen=True)
class Entries:
    """An object whose values are all of one kind."""

    kind: Kind

    def faults(self, value: object, where: str) -> Iterator[str]:
        """As Kind says."""
        if not isinstance(value, dict):
            yield f"{where!r} is {_short(value)}, not an object"
            return
        for name, entry in value.items():
            yield from TEXT.faults(name, f"a name in {where}")
            yield from self.kind.faults(entry, f"{where}.{name}")


@dataclass(frozen=True)
class Fields:
    """An object with named entries; names of neither group may hold anything."""

    required: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)

    def faults(self, value: object, where: str) -> Iterator[str]:
        """As Kind says; ``where`` is empty for the whole file."""
        if not isinstance(value, dict):
            yield f"{where!r} is {_short(value)}, not an object"
            return
        prefix = f"{where}." if where else ""
        for name, kind in self.required.items():
            if name not in value:
                yield f"it lacks {prefix + name!r}"
            else:
                yield from kind.faults(value[name], prefix + name)
        for name, kind in self.optional.items():
            if name in value:
                yield from kind.faults(value[name], prefix + name)


@dataclass(frozen=True)
class Nullable:
    """null, or a value of a kind."""

    kind: Kind

    def faults(self, value: object, where: str) -> Iterator[str]:
        """As Kind says."""
        if value is not None:
            yield from self.kind.faults(value, where)


def whole(low: int, high: int) -> Scalar:
    """A whole number from ``low`` to ``high``; true and false are none."""
    return Scalar(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def one_of(*values: str | int) -> Scalar:
    """One of a few values, of the same type."""
    names = ", ".join(map(repr, values))
    # Compared one by one: a list is not hashable, and 1 equals true.
    return Scalar(f"one of {names}", lambda value: any(type(value) is type(v) and value == v for v in values))


def _is_text(value: object) -> bool:
    """Also no NUL and no half of a pair: neither can be in the name of a file."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


CHECKSUM_NAME = "json_checksum"
"""Entry with the checksum of all the others."""
WHOLE = whole(0, 2**63 - 1)
POSITIVE = whole(1, 2**63 - 1)
NUMBER = Scalar("a finite number", lambda value: type(value) in (int, float) and _is_finite(value))
FLAG = Scalar("true or false", lambda value: isinstance(value, bool))
TEXT = Scalar("a text", _is_text)
OBJECT = Scalar("an object", lambda value: isinstance(value, dict))
CRC = Scalar("a checksum", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None)
SUMS = Fields({"blocks": Items(whole(0, 2**32 - 1)), "crc": whole(0, 2**32 - 1), "filled": whole(0, BLOCK_BYTES - 1)})
"""State of a ``BlockChecksums``."""


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def read_record(path: Path, kind: Fields, fix: str = DAMAGED) -> dict[str, Any]:
    """Read a JSON object whose entries have the right types, without the checksum of :func:`seal`.

    Args:
        fix: the way out, an imperative clause.
    Raises: ValueError naming the file and the first wrong entry; OSError when it cannot be read.
    """
    content = read_json(path, fix)
    require(content, kind, str(path), fix)
    content.pop(CHECKSUM_NAME, None)
    return content


def require(content: object, kind: Kind, name: str, fix: str = DAMAGED) -> None:
    """Raise ValueError for the first wrong entry of some parsed JSON; ``name`` is the file's."""
    for fault in kind.faults(content, ""):
        raise ValueError(f"{name} is damaged or of another program ({fault}); {fix}")


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of itself under ``json_checksum``, which replaces an earlier one."""
    plain: dict[str, Any] = json.loads(
        json.dumps({name: value for name, value in content.items() if name != CHECKSUM_NAME})
    )
    return plain | {CHECKSUM_NAME: _digest(plain)}


def is_sealed(content: Mapping[str, Any]) -> bool | None:
    """Whether the checksum fits the rest; None where the content has none (files of earlier releases)."""
    if CHECKSUM_NAME not in content:
        return None
    plain = {name: value for name, value in content.items() if name != CHECKSUM_NAME}
    return bool(content[CHECKSUM_NAME] == _digest(plain))


def _digest(plain: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def _short(value: object) -> str:
    text = repr(value if not isinstance(value, Sequence) else value[:60])
    return text if len(text) <= 60 else f"{text[:57]}..."

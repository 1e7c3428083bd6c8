"""Fields of a request's JSON body, each taken once; what nobody took is an error, and so is a size beyond its limit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from fairseq.serving.errors import ApiError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Body:
    """An object of a request.

    ```python
    body = Body.parse(b'{"n": 2}')
    body.whole("n", 1, low=1, high=8)  # 2
    body.end()  # ApiError for any other field
    ```
    """

    def __init__(self, content: Mapping[str, Any], path: str = "") -> None:
        """Hold an object; ``path`` is what messages put before the names of its fields."""
        self._left, self._path = dict(content), path
        self._known: list[str] = []

    @classmethod
    def parse(cls, text: bytes) -> Body:
        """Read JSON. Raises: ApiError when it is none, or no object."""
        try:
            content = json.loads(_decoded(text), parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(content, dict):
            raise ApiError(400, f"the body must be a JSON object, got {_short(content)}", code="invalid_json")
        return cls(content)

    def has(self, name: str) -> bool:
        """True if a field is there and not null."""
        return self._left.get(name) is not None

    def is_false(self, name: str) -> bool:
        """True if a field is false, which switches off what an object would set."""
        return self._left.get(name) is False

    def take(self, name: str) -> Any:
        """A field of any type; None where it is missing or null."""
        self._known.append(name)
        return self._left.pop(name, None)

    def whole(self, name: str, default: int | None, *, low: int, high: int) -> int | None:
        """A whole number within limits."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int:
            self.fail(name, f"must be a whole number, got {_short(value)}")
        return int(self._within(name, value, low, high))

    def number(self, name: str, default: float, *, low: float, high: float, above: bool = False) -> float:
        """A number within limits; with ``above`` it must not be the lower one."""
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not -math.inf < value < math.inf:
            self.fail(name, f"must be a number, got {_short(value)}")
        if above and value <= low:
            self.fail(name, f"must be above {low}, got {value}")
        return float(self._within(name, value, low, high))

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, got {_short(value)}")
        return value

    def text(self, name: str, *, longest: int) -> str | None:
        """A text of at most so many characters."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(name, f"must be a text, got {_short(value)}")
        if len(value) > longest:
            self.fail(name, f"may have at most {longest} characters, got {len(value)}")
        return value

    def object(self, name: str) -> Body | None:
        """An object within the object."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, got {_short(value)}")
        return Body(value, f"{self._path}{name}.")

    def items(self, name: str, *, most: int) -> list[Any] | None:
        """A list with at least one and at most so many items."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            self.fail(name, f"must be a list with items, got {_short(value)}")
        if len(value) > most:
            self.fail(name, f"may have at most {most} items, got {len(value)}")
        return list(value)

    def only(self, name: str, *values: Any) -> None:
        """A field of OpenAI's that has no effect here, and so may only have a value that has none there either."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in values):
            self.fail(name, f"{_short(value)} is not supported; leave it out")

    def ignore(self, *names: str) -> None:
        """Fields that mean nothing to a model, such as who asks."""
        for name in names:
            self.take(name)

    def end(self) -> None:
        """Raise ApiError when a field is left that nobody knows."""
        for name in self._left:
            self._fail(name, f"unknown field {self._path + name!r}; known: {', '.join(sorted(self._known))}", True)

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise ApiError about a field."""
        self._fail(name, f"{self._path}{name} {message}", False)

    def _within(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            self.fail(name, f"must be from {low} to {high}, got {_short(value)}")
        return value

    def _fail(self, name: str, message: str, is_unknown: bool) -> NoReturn:
        code = "unknown_field" if is_unknown else "invalid_value"
        raise ApiError(400, message, param=self._path + name, code=code)


def token_ids(value: Collection[Any], name: str, vocabulary: int) -> list[int]:
    """A list of token ids. Raises: ApiError for anything else."""
    for token in value:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ApiError(
                400,
                f"{name} holds {_short(token)}, not a token id from 0 to {vocabulary - 1}",
                param=name,
                code="invalid_value",
            )
    return list(value)


def _decoded(text: bytes) -> str:
    """JSON in one of its encodings. Raises: ValueError for bytes or escapes that are no characters."""
    decoded = text.decode(json.detect_encoding(text))
    if _SURROGATE.search(decoded):
        try:
            json.dumps(json.loads(decoded), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise ValueError(f"{half} is half of a pair of surrogates, which is no character") from None
    return decoded


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Text of tokens that come one by one, and the strings that end it."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from fairseq.hf.loading import byte_values

_BEFORE = 6
"""Tokens of the prompt that are decoded with the first new ones, so that a space between them is kept."""
_UNFINISHED = "\ufffd"
"""What stands for bytes that are not a character yet."""


class Codec:
    """A tokenizer that several threads use, or none: then texts are lists of token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # A fast tokenizer raises "Already borrowed" where two threads meet in it.
        self._lock = threading.Lock()

    @property
    def has_template(self) -> bool:
        """True if messages of a chat can be made a prompt."""
        return bool(self.tokenizer is not None and getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds at its ends unless ``special`` is False."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; special tokens are skipped unless ``special`` is True."""
        with self._lock:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token, which may end within a character; those of its text where no others are known."""
        text = self.decode([token], special=True)
        piece = self.tokenizer.convert_ids_to_tokens(token) if _UNFINISHED in text else None
        if piece is None:
            return text.encode()
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # of SentencePiece
            return bytes.fromhex(match[1])
        places = byte_values()
        return bytes(places[letter] for letter in piece) if places.keys() >= set(piece) else text.encode()

    def show(self, token: int) -> str:
        """A token for clients: its text, its bytes where it ends within a character, or without a tokenizer its id.

        Bytes are in OpenAI's form, ``bytes:\\xe2\\x80``.
        """
        if self.tokenizer is None:
            return str(token)
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a chat."""
        with self._lock:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


class TextStream:
    """The text after a prompt, piece by piece, as tokens come."""

    def __init__(self, codec: Codec, prompt: Sequence[int]) -> None:
        self._codec, self._ids = codec, list(prompt[-_BEFORE:])
        self._start, self._done = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that a token completes; empty where it ends within a character."""
        self._ids.append(token)
        return self._new(is_last=False)

    def end(self) -> str:
        """The rest, with what is no character."""
        return self._new(is_last=True)

    def _new(self, *, is_last: bool) -> str:
        before = self._codec.decode(self._ids[self._start : self._done])
        text = self._codec.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(_UNFINISHED) and not is_last):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]


class StopText:
    """Holds back text that may be the begin of a string that ends it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.is_stopped = tuple(stops), "", False

    def add(self, text: str) -> str:
        """The text that may be sent; after a stop string nothing more."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return held[: min(places)]
        keep = max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back and is no stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Characters at the end of the text that the stop string begins with."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

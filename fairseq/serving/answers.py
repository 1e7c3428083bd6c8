"""Answers in OpenAI's form, whole or as chunks of a stream.

A choice has one field more than OpenAI's: ``neighbors``, a list for each token, where the request asked for them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.serving.jobs import ChoiceEnd, Event, TokenEvent
from fairseq.serving.requests import Asked
from fairseq.serving.texts import Codec

Describe = Callable[[TokenEvent], list[dict[str, Any]]]
"""The neighbours of a token, as clients see them."""


@dataclass
class _Choice:
    """What has come of a choice."""

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)
    reason: str | None = None


class AnswerForm:
    """Makes the answer to one request of the events of its generations."""

    def __init__(self, asked: Asked, model: str, codec: Codec, describe: Describe) -> None:
        self._asked, self._model, self._codec, self._describe = asked, model, codec, describe
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self._id, self._created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self._first = [0]
        for generation in asked.generations:
            self._first.append(self._first[-1] + generation.num_choices)
        self._choices = [_Choice() for _ in range(self._first[-1])]
        self._num_new = 0

    def take(self, number: int, events: Sequence[Event]) -> None:
        """Keep the events of one of the generations."""
        for event in events:
            assert isinstance(event, (TokenEvent, ChoiceEnd)), event
            choice = self._choices[self._first[number] + event.choice]
            choice.text += event.text
            if isinstance(event, TokenEvent):
                choice.tokens.append(event)
                self._num_new += not event.is_prompt
            else:
                choice.reason = event.reason

    def whole(self) -> dict[str, Any]:
        """The answer, when all choices are complete."""
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        choices = [self._choice(number, choice) for number, choice in enumerate(self._choices)]
        return self._head(kind) | {"choices": choices, "usage": self._usage()}

    def begin(self) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""
        if not self._asked.is_chat:
            return []
        empty = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": number, "delta": empty, "logprobs": None, "finish_reason": None}])
            for number in range(len(self._choices))
        ]

    def chunks(self) -> list[dict[str, Any]]:
        """Chunks for what was taken since the last ones."""
        found = []
        for number, choice in enumerate(self._choices):
            if choice.tokens or choice.text or choice.reason is not None:
                if choice.tokens or choice.text:
                    found.append(self._chunk([self._choice(number, choice, is_chunk=True)]))
                if choice.reason is not None:
                    found.append(self._chunk([self._last(number, choice.reason)]))
                self._choices[number] = _Choice()
        return found

    def usage_chunk(self) -> list[dict[str, Any]]:
        """The last chunk of a stream, where the request wants the numbers of tokens."""
        return [self._chunk([]) | {"usage": self._usage()}] if self._asked.with_usage else []

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        return self._head(kind) | {"choices": choices} | ({"usage": None} if self._asked.with_usage else {})

    def _last(self, number: int, reason: str) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {}} if self._asked.is_chat else {"text": ""}
        return {"index": number, **content, "logprobs": None, "finish_reason": reason}

    def _choice(self, number: int, choice: _Choice, *, is_chunk: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"index": number}
        if not self._asked.is_chat:
            found["text"] = choice.text
        elif is_chunk:
            found["delta"] = {"content": choice.text}
        else:
            found["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        found["logprobs"] = self._logprobs(choice)
        found["finish_reason"] = None if is_chunk else choice.reason
        if any(generation.num_neighbors for generation in self._asked.generations):
            found["neighbors"] = [self._describe(event) for event in choice.tokens]
        if self._asked.with_ids:
            found["token_ids"] = [event.token for event in choice.tokens]
        return found

    def _logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        if self._asked.generations[0].num_top is None:
            return None
        if self._asked.is_chat:
            return {"content": [self._chat_logprob(event) for event in choice.tokens], "refusal": None}
        top: list[dict[str, float] | None] = []
        for event in choice.tokens:
            by_text: dict[str, float] = {}
            for token, logp in event.top:  # where two are shown alike, the likelier one stays
                by_text.setdefault(self._codec.show(token), logp)
            top.append(by_text or None)
        return {
            "tokens": [self._codec.show(event.token) for event in choice.tokens],
            "token_logprobs": [event.logp for event in choice.tokens],
            "top_logprobs": top,
            "text_offset": [event.offset for event in choice.tokens],
        }

    def _chat_logprob(self, event: TokenEvent) -> dict[str, Any]:
        def entry(token: int, logp: float | None) -> dict[str, Any]:
            known = None if self._codec.tokenizer is None else list(self._codec.bytes_of(token))
            return {"token": self._codec.show(token), "logprob": logp, "bytes": known}

        return entry(event.token, event.logp) | {"top_logprobs": [entry(token, logp) for token, logp in event.top]}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(generation.prompt) for generation in self._asked.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_new,
            "total_tokens": prompt + self._num_new,
        }

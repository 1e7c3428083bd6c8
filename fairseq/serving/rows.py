"""The sequences that the engine is generating: their tokens, text and memory, and what each token becomes for clients.

Shapes: V vocabulary, L positions of a prompt with scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fairseq.hf.decoding.mixing import Found, RowMemory
from fairseq.hf.decoding.sampling import TokenSampler
from fairseq.serving.errors import ApiError
from fairseq.serving.jobs import ChoiceEnd, Event, Failure, GenerationJob, TokenEvent
from fairseq.serving.texts import Codec, StopText, TextStream

_LOWEST_LOGP = -9999.0


@dataclass
class Row:
    """A choice of a request while it is generated."""

    job: GenerationJob
    choice: int
    ids: list[int]
    """Prompt and tokens so far."""
    sampler: TokenSampler
    memory: RowMemory | None
    text: TextStream | None
    """None for a model without a tokenizer."""
    stop: StopText
    num_new: int = 0
    num_characters: int = 0
    """Of the text so far."""
    is_done: bool = False
    events: list[Event] = field(default_factory=list)
    """Not delivered yet."""

    @classmethod
    def begin(
        cls, job: GenerationJob, choice: int, sampler: TokenSampler, memory: RowMemory | None, codec: Codec
    ) -> Row:
        """A choice whose prompt was read."""
        ids = list(job.request.prompt)
        text = None if codec.tokenizer is None else TextStream(codec, ids)
        return cls(job, choice, ids, sampler, memory, text, StopText(job.request.stops))

    def take(self, token: int, logp_V: Tensor | None, found: Found | None) -> None:
        """Append a token, and complete the choice where it ends.

        Args:
            logp_V: log-probabilities that the token was chosen from, where the request wants them.
        """
        request = self.job.request
        self.ids.append(token)
        self.num_new += 1
        is_end = token in self.sampler.end_tokens
        offset, whole = self.num_characters, "" if self.text is None else self.text.add(token)
        self.num_characters += len(whole)
        piece = self.stop.add(whole)
        logp, top = log_probabilities(logp_V, token, request.num_top)
        store = None if found is None else request.store
        found = None if found is None else found.first(request.num_neighbors)
        self.events.append(TokenEvent(self.choice, token, piece, offset, logp, top, found, store))
        if is_end or self.stop.is_stopped:
            self._end("stop")
        elif self.num_new >= request.max_tokens:
            self._end("length")

    def end_without_tokens(self) -> None:
        """Complete a choice of a request that wants only its prompt."""
        self._end("length")

    def fail(self, error: ApiError) -> None:
        """Give up the request of this choice."""
        self.is_done = self.job.is_cancelled = True
        self.events.append(Failure(error))

    def _end(self, reason: str) -> None:
        rest = "" if self.text is None else self.stop.add(self.text.end())
        rest += self.stop.end()
        reason = "stop" if self.stop.is_stopped else reason
        self.is_done = True
        self.events.append(ChoiceEnd(self.choice, reason, rest))


def prompt_events(
    prompt: Sequence[int], logp_LV: Tensor | None, found: Sequence[Found | None], num_top: int | None, codec: Codec
) -> list[TokenEvent]:
    """Events for the tokens of a prompt that is returned; the first one has no log-probability.

    Args:
        logp_LV: log-probabilities after each token of the prompt; None where none are wanted.
        found: candidates after each token.
    """
    text = None if codec.tokenizer is None else TextStream(codec, [])
    events: list[TokenEvent] = []
    offset = 0
    for place, token in enumerate(prompt):
        logp_V = None if logp_LV is None or not place else logp_LV[place - 1]
        logp, top = log_probabilities(logp_V, token, num_top)
        there = found[place - 1] if place and found else None
        piece = "" if text is None else text.add(token)
        events.append(TokenEvent(0, token, piece, offset, logp, top, there, is_prompt=True))
        offset += len(piece)
    if text is not None and events and (rest := text.end()):
        events[-1] = replace(events[-1], text=events[-1].text + rest)
    return events


def log_probabilities(
    logp_V: Tensor | None, token: int, num_top: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """That of a token and those of the likeliest ones, none of them below the one that OpenAI's reference names for
    tokens that are very unlikely: JSON has no infinity, which is the logarithm where the neighbours' share is 1."""
    if logp_V is None or num_top is None:
        return None, ()
    best = torch.topk(logp_V, min(num_top, len(logp_V))) if num_top else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.clamp(min=_LOWEST_LOGP).tolist()))
    return float(logp_V[token].clamp(min=_LOWEST_LOGP)), top

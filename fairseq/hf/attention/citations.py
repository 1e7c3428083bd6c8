"""Citations: the passages of the user's documents that an answer read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.hf.hooks.protocols import Tokenizer
from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.lookup import SelectedMemories


@dataclass(frozen=True)
class Citation:
    """A passage of one document."""

    document: int
    """Number of the document."""
    start: int
    """First token, counted within the document."""
    stop: int
    """First token after the passage."""
    weight: float
    """Share of all that memories gave (see :func:`cite`)."""
    text: str | None
    """The passage as text, where a tokenizer is at hand."""


def cite(
    steps: Iterable[Mapping[int, SelectedMemories]],
    memory: Memory,
    *,
    top: int,
    span: int,
    row: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[Citation]:
    """The ``top`` passages of at most ``span`` tokens that gave most, none within another, the heaviest first.

    The contribution of a token is its share of the attention times the length of its value: attention rests on places
    with short values when it looks for nothing (arXiv 2004.10102). The first token of a document is such a sink, and
    dropped.
    """
    weight_N = torch.zeros(len(memory.token_N))
    for step in steps:
        for layer, selected in step.items():
            token_HTK, value_GSD = selected.token_BHTK[row].cpu(), memory.layers[layer].value_GSD
            length_GS = torch.linalg.vector_norm(value_GSD.float().cpu(), dim=-1)
            length_HS = length_GS.repeat_interleave(len(token_HTK) // len(length_GS), 0)
            at_HTK = torch.searchsorted(memory.place_S, token_HTK.clamp(min=0)).clamp_(max=len(memory) - 1)
            given_HTK = selected.weights()[row].cpu() * length_HS.gather(1, at_HTK.flatten(1)).view_as(token_HTK)
            weight_N.index_add_(
                0, token_HTK.clamp(min=0).flatten(), given_HTK.masked_fill(token_HTK < 0, 0.0).flatten()
            )
    weight_N[list(memory.document_starts)] = 0.0
    whole = float(weight_N.sum()) or 1.0
    starts = [*memory.document_starts, len(weight_N)]
    citations: list[Citation] = []
    while len(citations) < top and float(weight_N.max()) > 0:
        places = [_heaviest(weight_N, first, stop, span) for first, stop in zip(starts, starts[1:])]
        start, stop, heaviest = max(places, key=lambda place: place[2])
        document, place = memory.where(start)
        text = tokenizer.decode(memory.token_N[start:stop].tolist()) if tokenizer is not None else None
        citations.append(Citation(document, place, place + stop - start, heaviest / whole, text))
        weight_N[start:stop] = 0.0
    return citations


def _heaviest(weight_N: Tensor, first: int, stop: int, span: int) -> tuple[int, int, float]:
    """(start, stop, weight) of the heaviest passage of a document."""
    span = min(span, stop - first)
    sums = weight_N[first:stop].unfold(0, span, 1).sum(1)
    best = int(sums.argmax())
    return first + best, first + best + span, float(sums[best])

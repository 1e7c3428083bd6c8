"""Which parts of the user's documents an answer read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.memory.extended_mind.cache import Memory
from fairseq.memory.extended_mind.lookup import Chosen


@dataclass(frozen=True)
class Citation:
    """A run of tokens of one document."""

    document: int
    """Number of the document."""
    start: int
    """First token, counted within the document."""
    stop: int
    """First token behind the run."""
    weight: float
    """Share of all the attention to memories that the run got."""
    text: str | None
    """The run as text, where a tokenizer is at hand."""


def cite(
    steps: Iterable[Mapping[int, Chosen]], memory: Memory, *, top: int, row: int = 0, tokenizer: Any = None
) -> list[Citation]:
    """The ``top`` tokens of a memory with most attention, neighbours joined into runs; the heaviest run first.

    The first token of a document is left out: attention rests there when it looks for nothing (arXiv 2309.17453).
    """
    weight_N = torch.zeros(len(memory.token_N))
    for step in steps:
        for chosen in step.values():
            token, weight = chosen.token_BHTK[row].reshape(-1).cpu(), chosen.weights()[row].reshape(-1).cpu()
            weight_N.index_add_(0, token[token >= 0], weight[token >= 0].float())
    weight_N[list(memory.document_starts)] = 0.0
    whole = float(weight_N.sum()) or 1.0
    best = [token for token in weight_N.topk(min(top, len(weight_N))).indices.tolist() if weight_N[token] > 0]
    runs: list[list[int]] = []
    for token in sorted(best):
        if runs and token == runs[-1][1] and token not in memory.document_starts:
            runs[-1][1] = token + 1
        else:
            runs.append([token, token + 1])
    citations = []
    for start, stop in runs:
        document, place = memory.where(start)
        text = tokenizer.decode(memory.token_N[start:stop].tolist()) if tokenizer is not None else None
        share = float(weight_N[start:stop].sum()) / whole
        citations.append(Citation(document, place, place + stop - start, share, text))
    return sorted(citations, key=lambda citation: -citation.weight)

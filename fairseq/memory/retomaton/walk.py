"""Scoring text that is given with RetoMaton, in one compiled loop where nothing is searched on the way.

Shapes: B sequences, N positions of all of them, D key width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss.index import FaissIndex
from fairseq.memory.index.lists.pq_rescoring import PqScorer
from fairseq.memory.retomaton.automaton import Retomaton
from fairseq.memory.retomaton.reader import Places, side_by_side
from fairseq.memory.sources.log_sums import for_kernels
from fairseq.memory.types import LogSums, Metric
from fairseq.runtime.threads import map_in_threads

_PARTS_PER_THREAD = 4  # sequences differ in what they take


def can_walk(memory: Retomaton) -> bool:
    """True for a memory whose pointers are scored by the codes of an index, and whose tokens are at hand."""
    external = memory.external
    index = external.index
    if memory.compat or memory.no_pointer or external.score != "index" or not isinstance(index, FaissIndex):
        return False
    return external.row_tokens is not None and isinstance(index.row_scorer, PqScorer)


def walk_text(
    memory: Retomaton, query_ND: Tensor, token_N: Tensor, lengths_B: Tensor, temperature: float
) -> tuple[LogSums, int]:
    """Sums of the candidates of every position, as ``scoring.log_sums`` of what ``read_text`` hands over ahead.

    Args:
        memory: one that :func:`can_walk`.
        query_ND, token_N, lengths_B: as in ``read_text``.
    Returns: the sums, float32 (N,), and at how many positions a search was needed.
    """
    from fairseq.memory.retomaton.walk_kernels import walk

    external, index = memory.external, memory.external.index
    assert isinstance(index, FaissIndex)
    tokens, scorer = external.row_tokens, index.row_scorer
    query_ND = query_ND.detach().float().cpu().contiguous()
    text = tuple(x.contiguous().numpy() for x in (index.as_compared(query_ND), token_N.long()))
    hit_N, whole_N = (np.full(len(query_ND), -np.inf, np.float32) for _ in range(2))
    numbers = for_kernels(temperature)
    starts_B, num_searched = lengths_B.cumsum(0) - lengths_B, 0
    settings = (memory.role_R, memory.clusters, memory.min_knns, memory.max_knns, numbers, (hit_N, whole_N))
    for group in side_by_side(lengths_B, external.k):
        places = Places(query_ND, token_N, starts_B[group], lengths_B[group])
        neighbors, at_N = places.neighbors(memory)
        found = tuple(x.contiguous().numpy() for x in (at_N, neighbors.ids_NK, neighbors.scores_NK))

        def read(part: Tensor) -> int:
            own = (places.starts_B[part].numpy(), places.lengths_B[part].numpy(), *text)  # noqa: B023
            return walk(own, found, scorer.coded, index.metric is Metric.L2, tokens, *settings)  # noqa: B023

        count = min(len(group), _PARTS_PER_THREAD * torch.get_num_threads())
        num_searched += sum(map_in_threads(read, [torch.arange(i, len(group), count) for i in range(count)]))
    return LogSums(torch.from_numpy(hit_N), torch.from_numpy(whole_N)), num_searched

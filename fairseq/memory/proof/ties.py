"""Neighbours that hang on rounding: the k-th nearest row and the next are equally near.

A store of a text has equal keys wherever the text repeats itself, such as at the start of each sentence. Which of them
are among the k nearest then depends on the last bits of the query, and these on the batch that it was computed in.
"""

from __future__ import annotations

from torch import Tensor

from fairseq.memory.sources.external import ExternalMemory

_ROUNDING = 1e-5  # of the squared lengths that distances and products are sums of, in float32


def has_tied_end(memory: ExternalMemory, query_D: Tensor) -> bool:
    """True if rounding may exchange the k-th neighbour of a query for another row."""
    if memory.k >= memory.store.num_alive:
        return False
    query_1D = query_D.detach().float().cpu().reshape(1, -1).contiguous()
    score_K = memory.index.search(query_1D, memory.k + 1).scores_NK[0]
    last, after = float(score_K[-2]), float(score_K[-1])
    scale = float(query_1D.square().sum()) + abs(last)
    return last - after <= _ROUNDING * scale  # False for the -inf of lists that hold fewer rows

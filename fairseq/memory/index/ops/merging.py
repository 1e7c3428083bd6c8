"""Results of several searches made one, and rows that must not be found taken out of them.

Shapes: N queries, K neighbours, L asked of each part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.ops.ordering import argsort_descending
from fairseq.memory.types import Array

_FIRST_MORE = 64


def alive_of(
    search: Callable[[int], tuple[Tensor, Tensor]], deleted: Array, k: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The k best rows of each query that are not deleted, by a search that finds deleted ones too.

    Args:
        search: k -> ids and scores, best first, ids of -1 for none.
    """
    more = min(num_rows, k + min(len(deleted), _FIRST_MORE))
    while True:
        ids, scores = search(more)
        if not len(deleted):
            return ids, scores
        deleted_mask = torch.from_numpy(np.isin(ids.numpy(), deleted))
        ids, scores = ids.masked_fill(deleted_mask, -1), scores.masked_fill(deleted_mask, -torch.inf)
        # Enough are alive, or the search ended before it had found as many as it was asked for.
        enough = ((ids >= 0).sum(1) >= k) | ((ids < 0) & ~deleted_mask).any(1)
        if more == num_rows or bool(enough.all()):
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
            return ids.gather(1, order), scores.gather(1, order)
        more = min(num_rows, 4 * more)


def merged(results: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of what was found in parts of the rows.

    Libraries for GPUs return neighbours out of order, miss some or repeat them where many are asked for, and ask for at
    most 2048. What they return is put in order here, and a query is in doubt when a part may have held more of its k
    best than it returned: then it was cut off, or its result is invalid.

    Args:
        found: of each part ids (N, L) and scores, -1 for none.
        sizes: rows of each part.
    Returns: ids (N, k), -1 for none, scores, and the queries that are in doubt.
    """
    doubt_N = torch.zeros(len(results[0][0]), dtype=torch.bool)
    tidy = []
    for ids_NL, scores_NL in results:
        missing_NL = (ids_NL < 0) | scores_NL.isnan()
        doubt_N |= (missing_NL[:, :-1] & ~missing_NL[:, 1:]).any(1)  # a hole
        ids_NL, scores_NL = ids_NL.masked_fill(missing_NL, -1), scores_NL.masked_fill(missing_NL, -torch.inf)
        in_order = ids_NL.sort(dim=1)[0]
        doubt_N |= ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1)
        tidy.append((ids_NL, scores_NL))
    ids_NK, scores_NK = best_of(tidy, k)
    for (ids_NL, scores_NL), size in zip(tidy, sizes):
        if ids_NL.shape[1] < min(k, size):  # it was not asked for all that could matter
            whole_N = (ids_NL >= 0).all(1)
            doubt_N |= whole_N & (scores_NL.amin(1) >= scores_NK[:, -1])
    return ids_NK, scores_NK, doubt_N.nonzero()[:, 0]


def best_of(results: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query, ids (N, k) and scores; of equals those of the earlier result, then the earlier ones.

    Args:
        results: ids (N, L) and scores of each, -1 and -inf for none; L may differ.
    """
    ids, scores = (torch.cat([result[i] for result in results], 1) for i in (0, 1))
    short = k - ids.shape[1]
    if short > 0:
        ids = torch.nn.functional.pad(ids, (0, short), value=-1)
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
    place_NK = torch.from_numpy(argsort_descending(scores.numpy(), k))
    return ids.gather(1, place_NK), scores.gather(1, place_NK)

"""Scores of chosen rows from the full keys of a store. Shapes: N queries, K rows of each, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.memory.datastore.chunked_array import ChunkedArray
from fairseq.memory.index.faiss_library import pair_scores_in_place
from fairseq.memory.similarity import normalized
from fairseq.memory.types import Metric
from fairseq.runtime.hardware import fits_in_ram

_CHUNK_BYTES = 512 << 20  # of keys read for one chunk of queries, at most


def score_rows(keys: ChunkedArray, metric: Metric, query_ND: Tensor, ids_NK: Tensor) -> Tensor:
    """Similarity of each query with its own rows, float32 (N, K); -inf where the id is -1."""
    whole = keys.single_array
    if metric is not Metric.COS and whole is not None and fits_in_ram(whole.nbytes):
        return pair_scores_in_place(metric, query_ND, whole, ids_NK)
    # Rows are read in the order of the file and once per chunk of queries, however many of them share a row.
    query_ND = normalized(query_ND) if metric is Metric.COS else query_ND
    rows = max(1, _CHUNK_BYTES // (4 * keys.shape[1] * max(1, ids_NK.shape[1])))
    parts = []
    for queries, ids in zip(torch.split(query_ND, rows), torch.split(ids_NK, rows)):
        unique, inverse = torch.unique(ids, return_inverse=True)
        first = int((unique[:1] < 0).sum())  # the id -1 comes first, and inverse - 1 is -1 for it
        block_MD = keys.take(unique[first:])
        if metric is Metric.COS:
            block_MD = normalized(block_MD)
        measure = Metric.IP if metric is Metric.COS else metric
        parts.append(pair_scores_in_place(measure, queries, block_MD.numpy(), inverse - first))
    return torch.cat(parts) if parts else torch.empty(ids_NK.shape)

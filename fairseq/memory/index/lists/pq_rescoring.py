"""Scores of rows that are named, not searched, from the compressed keys of a faiss index.

Shapes: N queries, M rows for each, R rows of the index, L lists, S bytes of a code, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.faiss_library import SwigIndex, faiss_library, has_byte_codes
from fairseq.memory.index.lists.adc_search import codewords, residual_centroids
from fairseq.memory.types import Array
from fairseq.runtime.threads import run_in_threads

_MOST_BYTES = 8 << 30  # of a copy of the codes in the order of the rows
_LINE = 64
_MOST_LISTS = 1 << 24
_PAIRS_PER_TASK = 16 << 10  # to start threads takes as long as some thousands of pairs
_CHUNK_FLOATS = 64 << 20  # of decoded keys


def row_scorer(index: SwigIndex, *, by_distance: bool) -> Any:
    """The scorer of a faiss index's rows: the fast one for product-quantized keys, faiss itself for all others."""
    if has_byte_codes(index) and index.ntotal * (index.code_size + 8) <= _MOST_BYTES and index.nlist <= _MOST_LISTS:
        return PqScorer(index, by_distance=by_distance)
    return ReconstructionScorer(index, by_distance=by_distance)


def _in_lines(rows: int, size: int) -> Array:
    """Zeros, uint8 (rows, size), which begin where a line of the CPU's caches does."""
    memory = np.zeros(rows * size + _LINE, np.uint8)
    first = -memory.ctypes.data % _LINE
    return memory[first : first + rows * size].reshape(rows, size)


class PqScorer:
    """The codes of an IndexIVFPQ in the order of the rows: a score is a sum of a table's entries (``adc_search``)."""

    def __init__(self, index: SwigIndex, *, by_distance: bool) -> None:
        """Copy the codes, which takes as much memory as they do."""
        from fairseq.memory.index.lists.adc_kernels import write_biases

        faiss, lists = faiss_library(), index.invlists
        self._by_distance = by_distance
        self._words_SEJ, self._centroid_LD = codewords(index), residual_centroids(index)
        self._code_RS = _in_lines(index.ntotal, index.pq.M)
        # Side by side, so that a core waits for one line instead of two. Below 2^24 float32 has all integers.
        self._about_R2 = np.tile(np.array([0.0, -1.0], np.float32), (index.ntotal, 1))
        table_SJ, all_alive = np.empty((index.pq.M, index.pq.ksub), np.float32), np.empty(0, np.uint8)
        for number in range(index.nlist):
            size = lists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
                bias = np.empty(size, np.float32)
                own = (self._centroid_LD[number], self._words_SEJ, codes, ids, all_alive)
                write_biases(*own, by_distance, table_SJ, bias)
                self._code_RS[ids], self._about_R2[ids, 0], self._about_R2[ids, 1] = codes, bias, number

    @property
    def coded(self) -> tuple[Array, ...]:
        """What the kernels of ``pq_rescoring_kernels`` take."""
        return self._code_RS, self._about_R2, self._centroid_LD, self._words_SEJ

    def __call__(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Score of each query with each of its rows, (N, M); -inf where the id is -1."""
        from fairseq.memory.index.lists.pq_rescoring_kernels import score_codes

        scores_NM = torch.empty(ids_NM.shape)
        query, ids, out = query_ND.contiguous().numpy(), ids_NM.contiguous().numpy(), scores_NM.numpy()
        coded = self.coded
        tasks = min(2 * torch.get_num_threads(), int((ids_NM >= 0).sum()) // _PAIRS_PER_TASK)
        step = max(1, -(-len(ids_NM) // max(1, tasks)))
        parts = [slice(at, at + step) for at in range(0, len(ids_NM), step)]

        def score(part: slice) -> None:
            score_codes(coded, self._by_distance, query[part], ids[part], out[part])

        run_in_threads(score, parts)
        return scores_NM


class ReconstructionScorer:
    """Keys as faiss gives them back, for every kind of index that can."""

    def __init__(self, index: SwigIndex, *, by_distance: bool) -> None:
        """Have the index remember where its rows are. Raises: ValueError when it cannot give keys back."""
        lists = faiss_library().try_extract_index_ivf(index)
        if lists is not None:
            lists.make_direct_map()
        try:
            index.reconstruct(0)
        except RuntimeError as error:
            kind = type(index).__name__
            raise ValueError(
                f"an index of the kind {kind} does not give its keys back, which pointers need ({error}); have them "
                "scored by the full keys, or use an index of the kind ivfpq or flat"
            ) from None
        self._index, self._by_distance = index, by_distance

    def __call__(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        """Score of each query with each of its rows, (N, M); -inf where the id is -1. A row is decoded once a chunk."""
        step = max(1, _CHUNK_FLOATS // max(1, ids_NM.shape[1] * query_ND.shape[1]))
        parts = [self._scores(*part) for part in zip(torch.split(query_ND, step), torch.split(ids_NM, step))]
        return torch.cat(parts) if parts else torch.empty(ids_NM.shape)

    def _scores(self, query_ND: Tensor, ids_NM: Tensor) -> Tensor:
        unique_U, inverse_NM = torch.unique(ids_NM, return_inverse=True)
        keys_UD = torch.zeros(len(unique_U), query_ND.shape[1])
        real_U = unique_U >= 0
        if bool(real_U.any()):
            keys_UD[real_U] = torch.from_numpy(self._index.reconstruct_batch(unique_U[real_U].numpy()))
        keys_NMD = keys_UD[inverse_NM]
        if self._by_distance:
            scores_NM = (keys_NMD - query_ND[:, None]).square_().sum(2).neg_()
        else:
            scores_NM = torch.einsum("nmd,nd->nm", keys_NMD, query_ND)
        return scores_NM.masked_fill_(ids_NM < 0, -torch.inf)

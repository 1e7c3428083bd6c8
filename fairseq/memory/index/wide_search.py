"""Searches the lists of an inverted-file index for more neighbours than a list or two hold.

Then no list alone gives a threshold that lets few scores through (see ``list_search``). So all scores of a query are
written one behind the other, a sample of them tells about where the best k begin, and those that reach it are sorted.

Shapes: N queries, Q queries of a group, P lists a query visits, M keys of a list, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.files import Array
from fairseq.memory.index.decoded_lists import DecodedLists
from fairseq.memory.threads import ThreadBuffer, each_in_threads

_GROUP_SCORES = 64 << 20  # 256 MB: about 4,000 queries of 16,000 scores, enough for matrix products of a fair size
_BLOCK_SCORES = 1 << 20
_LISTS_OF_K = 4


def is_wide(k: int, num_keys: int, num_lists: int) -> bool:
    """Whether k neighbours are many beside the keys of a list."""
    return k * _LISTS_OF_K > num_keys / max(1, num_lists)


def wide_search(lists: DecodedLists, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best keys of the visited lists, best first: ids (N, k), -1 where fewer were found, and scores (N, k).

    Scores are inner products, for L2 less half the squared length of the key; minus infinity for deleted keys.
    """
    visited_NP = lists.visited(query_ND).numpy()
    query_ND = torch.cat([query_ND, query_ND.new_ones(len(query_ND), 1)], 1)
    numbers_L, inverse = np.unique(visited_NP, return_inverse=True)
    ids = [lists.ids(number) if number >= 0 else np.empty(0, np.int64) for number in numbers_L.tolist()]
    size_L = np.array([len(each) for each in ids], np.int64)
    of_list = _Rows(numbers_L, np.concatenate([*ids, np.empty(0, np.int64)]), size_L.cumsum() - size_L)
    place_NP = inverse.reshape(visited_NP.shape)
    size_NP = size_L[place_NP]
    ids_NK = torch.full((len(query_ND), k), -1, dtype=torch.int64)
    scores_NK = torch.full((len(query_ND), k), -torch.inf)
    for first, last in _groups(size_NP.sum(1)):
        part = slice(first, last)
        group = _Group(lists, of_list, query_ND[part], place_NP[part], size_NP[part])
        group.score()
        group.best(ids_NK[part].numpy(), scores_NK[part].numpy())
    return ids_NK, scores_NK


class _Rows:
    """Rows of the store in the visited lists, one list behind the other."""

    def __init__(self, numbers_L: Array, ids: Array, start_L: Array) -> None:
        self.numbers_L, self.ids, self.start_L = numbers_L, ids, start_L


class _Group:
    """Queries whose scores are held at the same time."""

    def __init__(self, lists: DecodedLists, rows: _Rows, query_QD: Tensor, place_QP: Array, size_QP: Array) -> None:
        self._lists, self._rows, self._query_QD, self._place_QP = lists, rows, query_QD, place_QP
        ends = size_QP.reshape(-1).cumsum()
        self._start_QP = (ends - size_QP.reshape(-1)).reshape(size_QP.shape)
        self._edges_Q = np.append(self._start_QP[:, 0], ends[-1])
        self._most = int(np.diff(self._edges_Q).max())
        self._scores = np.empty(int(ends[-1]), np.float32)
        self._buffer = ThreadBuffer(_BLOCK_SCORES, torch.float32)

    def score(self) -> None:
        """Write the scores of all queries with all keys of the lists they visit."""
        flat = self._place_QP.reshape(-1)
        order = np.argsort(flat, kind="stable")
        edges = np.flatnonzero(np.diff(flat[order], prepend=-1))
        tasks = [(int(flat[visits[0]]), visits) for visits in np.split(order, edges[1:])]
        # The most work first, so that no thread is left alone with a long one.
        tasks.sort(key=lambda task: -len(task[1]))
        each_in_threads(self._score_list, tasks, self._lists.use_one_thread)

    def _score_list(self, task: tuple[int, Array]) -> None:
        from fairseq.memory.index.wide_kernels import put_rows

        place, visits = task
        number = int(self._rows.numbers_L[place])
        if number < 0:
            return
        keys = self._lists.prepared(number)
        if not len(keys.ids_M):
            return
        keys_MD = torch.from_numpy(keys.keys_MD)
        offset_M = keys_MD.square().sum(1).mul_(-0.5 if self._lists.by_distance else 0.0)
        offset_M[torch.from_numpy(np.isneginf(keys.bias_GP.reshape(-1)[: len(keys_MD)]))] = -torch.inf
        keys_MD = torch.cat([keys_MD, offset_M[:, None]], 1)
        num_lists = self._place_QP.shape[1]
        step = max(1, _BLOCK_SCORES // len(keys_MD))
        for first in range(0, len(visits), step):
            part = visits[first : first + step]
            block_QM = self._buffer(len(part), len(keys_MD))
            torch.mm(self._query_QD[torch.from_numpy(part // num_lists)], keys_MD.T, out=block_QM)
            put_rows(block_QM.numpy(), self._start_QP.reshape(-1)[part], self._scores)

    def best(self, ids_QK: Array, scores_QK: Array) -> None:
        """Write the k best of each query, best first."""
        step = max(1, -(-len(ids_QK) // (4 * torch.get_num_threads())))
        tasks = [(first, min(first + step, len(ids_QK))) for first in range(0, len(ids_QK), step)]
        each_in_threads(lambda task: self._best_of(*task, ids_QK, scores_QK), tasks)

    def _best_of(self, first: int, last: int, ids_QK: Array, scores_QK: Array) -> None:
        from fairseq.memory.index.wide_kernels import look_up, select

        k = ids_QK.shape[1]
        order_QC = np.empty((last - first, 2 * k), np.int64)
        edges_Q, start_QP = self._edges_Q[first : last + 1], self._start_QP[first:last]
        select(self._scores, edges_Q, k, order_QC, np.empty(self._most, np.float32))
        order_QC.sort(axis=1)  # NumPy sorts integers with vector instructions
        from_QP = self._rows.start_L[self._place_QP[first:last]]
        found = (order_QC, edges_Q, start_QP, from_QP, self._rows.ids, self._scores)
        look_up(*found, ids_QK[first:last], scores_QK[first:last])


def _groups(count_N: Array) -> list[tuple[int, int]]:
    """Queries that follow each other, as many as have a bounded number of scores together."""
    groups = []
    first = held = 0
    for n, count in enumerate(count_N.tolist()):
        if held + count > _GROUP_SCORES and n > first:
            groups.append((first, n))
            first, held = n, 0
        held += count
    return groups + ([(first, len(count_N))] if first < len(count_N) else [])

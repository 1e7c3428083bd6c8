"""Searches the lists of an inverted-file index for more neighbours than a list or two hold.

Then no list alone gives a threshold that lets few keys through (see ``lists.search``). So the bounds of all scores of a
query, by products in 8 bits, are written one after the other; they bound what k scores reach for certain; the keys
whose bounds reach that are scored. The neighbours are those of comparing every key of the lists.

Passes go over the lists, each with all queries that probe it, or over the queries.

Shapes: N queries, Q queries of a group, P lists a query probes, V visits of one list, M keys of a list, L lists,
D width, K neighbours.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from fairseq.memory.index.lists.decoded_lists import DecodedLists
from fairseq.memory.index.ops.kernels import GROUP
from fairseq.memory.types import Array
from fairseq.runtime.threads import ObjectPool, ThreadBuffer, map_in_threads, run_in_threads

_GROUP_SCORES = 160 << 20  # 640 MB: 9,000 queries of 18,000 scores, enough for matrix products of a fair size
_TILE_SCORES = 256 << 10  # 1 MB, which stays near between the product and the bounds


def large_k_search(lists: DecodedLists, query_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best keys of the probed lists, best first, of equals the lower id.

    Returns: ids (N, k), -1 where fewer were found, and scores (N, k), minus infinity there.
    """
    probed_NP = lists.probed_lists(query_ND).numpy()
    numbers_L, place_NP = np.unique(probed_NP, return_inverse=True)
    place_NP = place_NP.reshape(probed_NP.shape)
    sizes = [lists.size(number) if number >= 0 else 0 for number in numbers_L.tolist()]
    size_NP = -(-np.array(sizes, np.int64) // GROUP)[place_NP]  # in groups of keys
    queries = (np.ascontiguousarray(query_ND.numpy()), np.ascontiguousarray(lists.rotated(query_ND).numpy()))
    ids_NK, scores_NK = torch.empty((len(query_ND), k), dtype=torch.int64), torch.empty((len(query_ND), k))
    groups = _groups(size_NP.sum(1) * GROUP)
    size = max((int(size_NP[part].sum()) for part in groups), default=0)
    held, lists.room = lists.room, None  # a search at the same time takes memory of its own
    if not isinstance(held, _Room) or len(held.most_S) < size:
        held = _Room(size + size // 8, lists.products.raw_dtype)
    room: _Room = held
    for part in groups:
        group = _LargeKGroup(lists, numbers_L, [each[part] for each in queries], place_NP[part], size_NP[part], room)
        group.bound()
        group.select(k)
        group.score()
        group.best(ids_NK[part].numpy(), scores_NK[part].numpy())
    lists.room = room
    return ids_NK, scores_NK


class _Room:
    """Memory that groups use in turn; it stays with the lists, since fresh memory costs a quarter of the search."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.bound_SP = np.empty((size, GROUP), np.float32)
        self.most_S = np.empty(size, np.float32)
        self.raw = ThreadBuffer(_TILE_SCORES, dtype)


class _LargeKGroup:
    """Queries whose bounds are held at the same time."""

    def __init__(
        self, lists: DecodedLists, numbers_L: Array, queries: list[Array], place_QP: Array, size_QP: Array, room: _Room
    ) -> None:
        self._lists, self._numbers_L, self._place_QP, self._room = lists, numbers_L, place_QP, room
        self._query_QD, self._rotated_QD = queries
        ends_QP = size_QP.reshape(-1).cumsum().reshape(size_QP.shape)
        self._edge_QP = np.concatenate([ends_QP[:, :1] - size_QP[:, :1], ends_QP], 1)
        self._most = int(size_QP.sum(1).max(initial=0))
        self._gap_QP = np.zeros(size_QP.shape, np.float32)
        self._end_QP = np.zeros(size_QP.shape, np.int64)
        self._place_F = np.empty(0, np.int64)
        self._tasks = self._visits()

    def _visits(self) -> list[tuple[int, Array]]:
        """Of each list its number and which visits of all are its own; the most work first, so that no thread is left
        alone with a long one.
        """
        flat = self._place_QP.reshape(-1)
        order = np.argsort(flat, kind="stable")
        edges = np.flatnonzero(np.diff(flat[order], prepend=-1))
        parts = np.split(order, edges[1:]) if len(order) else []
        tasks = [(int(self._numbers_L[flat[visits[0]]]), visits) for visits in parts]
        return sorted((task for task in tasks if task[0] >= 0), key=lambda task: -len(task[1]))

    def bound(self) -> None:
        """Write the bounds of all scores."""
        run_in_threads(self._bound_list, self._tasks, self._lists.use_one_thread)

    def _bound_list(self, task: tuple[int, Array]) -> None:
        from fairseq.memory.index.lists.large_k_kernels import write_upper_bounds

        number, visits = task
        keys = self._lists.prepare(number)
        if not len(keys.ids_M):
            return
        largest_residual = keys.residual_GP.max()
        row_V, column_V = np.divmod(visits, self._place_QP.shape[1])
        tile = max(1, _TILE_SCORES // keys.columns)
        for first in range(0, len(visits), tile):
            row_T, column_T = row_V[first : first + tile], column_V[first : first + tile]
            by_distance, buffer = self._lists.by_distance, self._room.raw
            raw_TGP, bound_T4 = keys.bounded(self._rotated_QD, row_T, by_distance=by_distance, buffer=buffer)
            own = (np.float32(keys.step), bound_T4, largest_residual, keys.bias_GP, self._edge_QP[row_T, column_T])
            write_upper_bounds(raw_TGP, *own, self._room.bound_SP, self._room.most_S)
            self._gap_QP[row_T, column_T] = 2.0 * (bound_T4[:, 3] + bound_T4[:, 1] * largest_residual)

    def select(self, k: int) -> None:
        """Find the keys that may be among the k best of each query."""
        from fairseq.memory.index.lists.large_k_kernels import SelectionRoom, select_candidates

        parts = self._parts()
        num_groups, num_bounds = self._most + 1, (self._most + 1) * GROUP
        most_selected = max((part.stop - part.start for part in parts), default=0) * num_bounds

        def fresh() -> tuple[Array, SelectionRoom]:
            room = SelectionRoom(
                place_C=np.empty(num_bounds, np.int64),
                bound_C=np.empty(num_bounds, np.float32),
                lower_C=np.empty(num_bounds, np.float32),
                flag_S=np.empty(num_groups, np.int64),
            )
            return np.empty(most_selected, np.int64), room

        rooms = ObjectPool(fresh)

        def select_some(part: slice) -> Array:
            bound_SP, most_S, edge_QP = self._room.bound_SP, self._room.most_S, self._edge_QP[part]
            with rooms.borrow() as (place_F, room):
                gap_QP, end_QP = self._gap_QP[part], self._end_QP[part]
                select_candidates(bound_SP, most_S, edge_QP, gap_QP, k, place_F, end_QP, tuple(room))
                selected: Array = place_F[: self._end_QP[part][-1, -1]].copy()
            return selected

        selected = list(map_in_threads(select_some, parts))
        ends = np.cumsum([0] + [len(each) for each in selected])
        for part, end in zip(parts, ends):
            self._end_QP[part] += end
        self._place_F = np.concatenate(selected)

    def score(self) -> None:
        """Score them."""
        run_in_threads(self._score_list, self._tasks, self._lists.use_one_thread)

    def _score_list(self, task: tuple[int, Array]) -> None:
        from fairseq.memory.index.lists.large_k_kernels import score_selected

        number, visits = task
        ids_M, keys_MD = self._lists.keys(number)
        row_V, column_V = np.divmod(visits, self._place_QP.shape[1])
        end_V = self._end_QP[row_V, column_V]
        # The keys of a query's first list come after those of the last list of the query before.
        begin_V = np.where(visits > 0, self._end_QP.reshape(-1)[visits - 1], 0)
        where = (begin_V, end_V, self._edge_QP[row_V, column_V] * GROUP)
        own = (keys_MD, ids_M, self._lists.by_distance)
        score_selected(self._query_QD, row_V, *where, *own, self._place_F)

    def best(self, ids_QK: Array, scores_QK: Array) -> None:
        """Write the k best of each query, best first."""
        run_in_threads(functools.partial(self._best_of, ids_QK=ids_QK, scores_QK=scores_QK), self._parts())

    def _best_of(self, part: slice, ids_QK: Array, scores_QK: Array) -> None:
        from fairseq.memory.index.lists.large_k_kernels import gather_packed, unpack

        end_Q = self._end_QP[part, -1].copy()  # whose numbers follow each other, as the kernel is compiled for
        begin_Q = np.append(self._end_QP[part.start - 1, -1] if part.start else 0, end_Q[:-1])
        packed_QC = np.empty((len(begin_Q), int((end_Q - begin_Q).max(initial=0))), np.int64)
        gather_packed(self._place_F, begin_Q, end_Q, packed_QC)
        packed_QC.sort(axis=1)  # NumPy sorts integers with vector instructions
        unpack(packed_QC, ids_QK[part], scores_QK[part])

    def _parts(self) -> list[slice]:
        count = len(self._place_QP)
        step = max(1, min(256, -(-count // (4 * torch.get_num_threads()))))
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _groups(count_N: Array) -> list[slice]:
    """Queries that follow each other, as many as have a bounded number of scores together."""
    groups = []
    first = held = 0
    for n, count in enumerate(count_N.tolist()):
        if held + count > _GROUP_SCORES and n > first:
            groups.append(slice(first, n))
            first, held = n, 0
        held += count
    return groups + ([slice(first, len(count_N))] if first < len(count_N) else [])

"""Compiled loops of exact search (``candidates.py``): collecting candidates, pruning them, scoring them in float32.

Import where used: numba takes half a second to load.

Shapes: N or Q queries, M columns of scores (keys), C candidates a query may hold, H pairs, D width, K neighbours.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.candidates.kernels import append_hits, prune
from fairseq.memory.index.ops.kernels import KEY_TYPES, approx_kth_largest, compiled, dot, neg_sq_l2
from fairseq.memory.index.ops.lane_sum_kernels import products, squared_distances
from fairseq.memory.index.ops.rounding_kernels import bounds
from fairseq.memory.index.ops.tile_loop_kernels import INSTRUCTIONS, TILE_KEYS
from fairseq.memory.index.ops.tile_product_kernels import lowest_bit, reaching_keys, tile_products, tile_registers


class BoundedCandidates(NamedTuple):
    """The candidates of a group of queries, each with a bound that its score is not below."""

    lower_QC: Any
    ids_QC: Any
    filled_Q: Any
    """Candidates of each query."""
    threshold_Q: Any
    """A score that k keys at least reach; rises."""
    width_Q: Any
    """Largest distance of a score above its lower bound; grows."""


_NO_SHARE = np.float32(0.0)
CHUNK_KEYS = 4 * TILE_KEYS
"""Keys that all queries of a group are compared with before the next."""
# Types of a call, for ``compiled``.
_ABOUT = "Tuple((f4[::1], f4[::1], f4[::1], f4[::1], f4[::1]))"
_CANDIDATES = "Tuple((f4[:,::1], i8[:,::1], i8[::1], f4[::1], f4[::1]))"


@compiled()
def _make_room(candidates: Any, about_Q4: Any, q: int, k: int, wanted: int) -> bool:
    """Prune a query's candidates, so that as many as wanted find room. Returns: False where there is too little."""
    lower_QC, ids_QC, filled_Q, threshold_Q, width_Q = candidates
    room = lower_QC.shape[1]
    filled, threshold = prune(lower_QC[q], ids_QC[q], filled_Q[q], k, threshold_Q[q], width_Q[q])
    filled_Q[q], threshold_Q[q], about_Q4[q, 3] = filled, threshold, threshold
    return bool(filled <= min(room - wanted, 3 * room // 4))


@functools.cache
def collector(name: str) -> Any:
    """The kernel that multiplies the tiles of an instruction set and collects the keys that may be among the k best.

    ``(row_QE, about_Q4, key_B, start_M, about, first_row, k, candidates, key, query)``: see ``RoundedQueries`` for the
    rows, of which there are so many more as a tile has, and more that nothing can reach; ``KeyBlock`` for the keys;
    ``first_row`` is the row number of the first; ``candidates`` are
    ``BoundedCandidates``, and ``about`` the five rows about keys, as plain tuples, which numba recognises faster.
    It begins at a key and a query. Returns: those to resume at, and a query whose candidates leave too little room for
    that; -1 at the end.
    """
    rows, lanes = INSTRUCTIONS[name].rows, max(8, INSTRUCTIONS[name].lanes)
    tile, reaches = tile_products(name, rows), reaching_keys(lanes, rows)
    prepare_registers, release_registers = tile_registers(name)

    def collect(
        row_QE: Any, about_Q4: Any, key_B: Any, start_M: Any, about: Any, first_row: int, k: int, candidates: Any,
        key: int, query: int,
    ) -> tuple[int, int, int]:  # fmt: skip
        columns = row_QE.shape[1]
        raw_RX, hit_R = np.empty((rows, TILE_KEYS), np.int32), np.empty(rows, np.int64)
        step_M, weight_M, size_M, bias_M, slack_M = about
        lower_QC, ids_QC, filled_Q, _, width_Q = candidates
        # The keys of a chunk stay near, and so do the candidates of a tile's queries.
        chunk = TILE_KEYS * max(1, min(CHUNK_KEYS // TILE_KEYS, (lower_QC.shape[1] - k) // (4 * TILE_KEYS)))
        prepare_registers()
        while key < len(start_M):
            while query < len(filled_Q):
                for q in range(query, min(query + rows, len(filled_Q))):
                    if filled_Q[q] > lower_QC.shape[1] - chunk and not _make_room(candidates, about_Q4, q, k, chunk):
                        release_registers()
                        return key, query, q
                for first in range(key, min(key + chunk, len(start_M)), TILE_KEYS):
                    tile(row_QE, query, key_B, first * columns, columns, start_M, first, raw_RX)
                    hits = reaches(raw_RX, about_Q4, query, step_M, weight_M, size_M, bias_M, first, hit_R)
                    while hits:
                        i = lowest_bit(hits)
                        hits &= hits - 1
                        q = query + i
                        append_hits(
                            raw_RX[i], hit_R[i], step_M, weight_M, size_M, bias_M, slack_M, first, first_row,
                            about_Q4[q, 0], about_Q4[q, 1], about_Q4[q, 2], _NO_SHARE, _NO_SHARE, q, lower_QC, ids_QC,
                            filled_Q, width_Q,
                        )  # fmt: skip
                query += rows
            key, query = key + chunk, 0
        release_registers()
        return key, query, -1

    collect.__qualname__ = f"collect_{name}"
    types = f"(i1[:,::1], f4[:,::1], i1[::1], i4[::1], {_ABOUT}, i8, i8, {_CANDIDATES}, i8, i8)"
    return compiled(types)(collect)


_reaches = reaching_keys(8, 1)


@compiled(
    f"(i4[:,::1], f4[:,::1], {_ABOUT}, i8, i8, {_CANDIDATES}, i8, i8)",
    f"(f4[:,::1], f4[:,::1], {_ABOUT}, i8, i8, {_CANDIDATES}, i8, i8)",
)
def collect_products(
    raw_QM: Any, about_Q4: Any, about: Any, first_row: int, k: int, candidates: Any, key: int, query: int
) -> tuple[int, int, int]:
    """What :func:`collector` makes, for products that a library has computed."""
    step_M, weight_M, size_M, bias_M, slack_M = about
    lower_QC, ids_QC, filled_Q, _, width_Q = candidates
    full = lower_QC.shape[1] - TILE_KEYS
    hit_R = np.empty(1, np.int64)
    while query < len(raw_QM):
        for first in range(key, raw_QM.shape[1], TILE_KEYS):
            raw_X = raw_QM[query, first : first + TILE_KEYS]
            if _reaches(raw_X, about_Q4, query, step_M, weight_M, size_M, bias_M, first, hit_R):
                if filled_Q[query] > full and not _make_room(candidates, about_Q4, query, k, TILE_KEYS):
                    return first, query, query
                append_hits(
                    raw_X, hit_R[0], step_M, weight_M, size_M, bias_M, slack_M, first, first_row,
                    about_Q4[query, 0], about_Q4[query, 1], about_Q4[query, 2], _NO_SHARE, _NO_SHARE, query, lower_QC,
                    ids_QC, filled_Q, width_Q,
                )  # fmt: skip
        key, query = 0, query + 1
    return 0, query, -1


@compiled(
    f"(i4[:,::1], f4[:,::1], {_ABOUT}, i8, f4[::1])",
    f"(f4[:,::1], f4[:,::1], {_ABOUT}, i8, f4[::1])",
)
def reached_in_sample(raw_QM: Any, about_Q4: Any, about: Any, rank: int, out_Q: Any) -> None:
    """A number that so many keys of a sample reach for certain; of all keys nearly always enough do."""
    step_M, weight_M, size_M, bias_M, slack_M = about
    lower_M = np.empty(raw_QM.shape[1], np.float32)
    for q in range(len(raw_QM)):
        scale, zero, width = about_Q4[q, 0], about_Q4[q, 1], about_Q4[q, 2]
        for m in range(len(lower_M)):
            about = (size_M[m], width, bias_M[m], slack_M[m])
            bound, below = bounds(raw_QM[q, m], zero, step_M[m], weight_M[m], scale, *about)
            lower_M[m] = bound - below
        out_Q[q] = approx_kth_largest(lower_M, rank)


@compiled(f"({_CANDIDATES}, i8)")
def prune_all(candidates: Any, k: int) -> None:
    """:func:`prune` for every query."""
    lower_QC, ids_QC, filled_Q, threshold_Q, width_Q = candidates
    for q in range(len(filled_Q)):
        filled, threshold = prune(lower_QC[q], ids_QC[q], filled_Q[q], k, threshold_Q[q], width_Q[q])
        filled_Q[q], threshold_Q[q] = filled, threshold


@compiled("(f4[:,::1], i8[::1], f4[:,::1], i8[::1], b1, f4[::1])")
def score_pairs(query_ND: Any, row_H: Any, keys_MD: Any, col_H: Any, by_distance: bool, out_H: Any) -> None:
    """Inner product, or minus the squared distance, of H pairs of a query and a key."""
    for i in range(len(row_H)):
        query_D, key_D = query_ND[row_H[i]], keys_MD[col_H[i]]
        out_H[i] = neg_sq_l2(query_D, key_D) if by_distance else dot(query_D, key_D)


@compiled(*(f"(f4[::1], {keys}[:,::1], i8[::1], b1, f4[::1])" for keys in KEY_TYPES))
def score_some(query_D: Any, keys_MD: Any, row_H: Any, by_distance: bool, out_H: Any) -> None:
    """Inner product, or minus the squared distance, of a query and some rows of the keys, four of them at a time."""
    last = len(row_H) - 1
    for first in range(0, len(row_H), 4):
        b, c, d = min(first + 1, last), min(first + 2, last), min(first + 3, last)
        keys_4 = (keys_MD[row_H[first]], keys_MD[row_H[b]], keys_MD[row_H[c]], keys_MD[row_H[d]])
        scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
        for i in range(min(4, len(row_H) - first)):
            out_H[first + i] = -scores_4[i] if by_distance else scores_4[i]


@compiled(*(f"(f4[:,::1], {keys}[:,::1], i8, b1, f4[::1], {_CANDIDATES}, f4[:,::1])" for keys in KEY_TYPES))
def score_candidates(
    query_QD: Any, keys_MD: Any, first_row: int, by_distance: bool, bound_Q: Any, candidates: Any, true_QC: Any
) -> None:
    """Score the candidates whose rows are among ``keys_MD``, which start at ``first_row``; ids rise along a query.

    Only those whose low bound reaches ``bound_Q`` and that have no score yet (NaN) are scored.
    """
    lower_QC, ids_QC, filled_Q, _, _ = candidates
    # Four at a time: keys come from far, and four streams of them hide the waiting. The last four may be fewer, with
    # one of them repeated.
    four = np.empty(4, np.int64)
    for q in range(len(filled_Q)):
        ids_C, query_D = ids_QC[q, : filled_Q[q]], query_QD[q]
        lower_C, true_C, bound = lower_QC[q], true_QC[q], bound_Q[q]
        waiting = 0
        past = np.searchsorted(ids_C, first_row + len(keys_MD))
        for i in range(np.searchsorted(ids_C, first_row), past + 1):
            if i < past:
                if lower_C[i] < bound or not np.isnan(true_C[i]):
                    continue
                four[waiting] = i
                waiting += 1
                if waiting < 4:
                    continue
            if waiting:
                four[waiting:] = four[0]
                keys = (ids_C[four[0]], ids_C[four[1]], ids_C[four[2]], ids_C[four[3]])
                a_D, b_D = keys_MD[keys[0] - first_row], keys_MD[keys[1] - first_row]
                c_D, d_D = keys_MD[keys[2] - first_row], keys_MD[keys[3] - first_row]
                keys_4 = (a_D, b_D, c_D, d_D)
                scores_4 = squared_distances(query_D, keys_4) if by_distance else products(query_D, keys_4)
                for j in range(4):
                    true_C[four[j]] = -scores_4[j] if by_distance else scores_4[j]
                waiting = 0


@compiled("(f4[:,::1], i8[::1], i8, f4[::1])")
def reached_by(lower_QC: Any, filled_Q: Any, k: int, out_Q: Any) -> None:
    """A number that at least k of each row's first ``filled`` entries reach, and few more; NaN reaches nothing."""
    for q in range(len(filled_Q)):
        out_Q[q] = approx_kth_largest(lower_QC[q, : filled_Q[q]], k)


@compiled(*(f"(f4[:,::1], {keys}[:,::1], b1, f4[:,::1])" for keys in KEY_TYPES))
def score_all(query_QD: Any, keys_MD: Any, by_distance: bool, out_QM: Any) -> None:
    """Scores of a few queries with all keys of a block: four keys at a time meet every query."""
    last = len(keys_MD) - 1
    for m in range(0, len(keys_MD), 4):
        n, o, p = min(m + 1, last), min(m + 2, last), min(m + 3, last)
        keys_4 = (keys_MD[m], keys_MD[n], keys_MD[o], keys_MD[p])
        for q in range(len(query_QD)):
            scores_4 = squared_distances(query_QD[q], keys_4) if by_distance else products(query_QD[q], keys_4)
            for i in range(min(4, len(keys_MD) - m)):
                out_QM[q, m + i] = -scores_4[i] if by_distance else scores_4[i]

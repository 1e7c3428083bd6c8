"""Compiled loops of searches in lists (``search.py``): rounding queries, scanning scores, settling ties.

Shapes: Q queries of a tile, N queries of a group, M keys of a list, E columns of the products, C candidates a query may
hold, D width. Scores are *higher is closer*.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fairseq.memory.index.ops.kernels import FINITE, GROUP, LOWEST, approx_kth_largest, compiled, dot, neg_sq_l2

# Float32 sums that are computed in two ways differ by a few units in the seventh place of what they are sums of.
_ROUNDING = np.float32(4e-6)


class CandidateHeap(NamedTuple):
    """The candidates of a group of queries."""

    score_NC: Any
    ids_NC: Any
    order_NC: Any
    """Rank in the order in which faiss would scan the keys."""
    filled_N: Any
    """Candidates of each query."""
    threshold_N: Any
    """A score that k keys at least reach; rises."""
    doubt_N: Any
    """Candidates so close below the threshold are kept as well."""
    is_open_N: Any
    """True for queries of which more keys tie than there is room for; others find their neighbours."""


class ScannedKeys(NamedTuple):
    """The keys of a list, in groups of P = GROUP neighbours."""

    residual_GP: Any
    bias_GP: Any
    """Minus infinity for a deleted key."""
    ids_M: Any
    keys_MD: Any


class ScannedQueries(NamedTuple):
    """The queries of a tile."""

    query_ND: Any
    """Queries of the group."""
    row_Q: Any
    """Their numbers in the group."""
    order_Q: Any
    """Plus the number of a key: the order in which faiss would scan it."""
    bound_Q4: Any
    """See ``bound_queries``."""


# Types of a call, for ``compiled``.
_HEAP = "Tuple((f4[:,::1], i8[:,::1], i8[:,::1], i8[::1], f4[::1], f4[::1], b1[::1]))"
_KEYS = "Tuple((f4[:,::1], f4[:,::1], i8[::1], f4[:,::1]))"
_QUERIES = "Tuple((f4[:,::1], i8[::1], i8[::1], f4[:,::1]))"


@compiled(
    "(f4[:,::1], i8[::1], f4[::1], b1, i8, f4[::1], f4, i8, i1[:,::1], f4[:,::1])",
    "(f4[:,::1], i8[::1], f4[::1], b1, i8, f4[::1], f4, i8, f4[:,::1], f4[:,::1])",
    fastmath=FINITE,
)
def bound_queries(
    query_ND: Any, row_Q: Any, centroid_D: Any, by_distance: bool, width: int, largest: Any, levels: Any,
    zero: int, quantized_QE: Any, bound_Q4: Any,
) -> None:  # fmt: skip
    """Turn queries into what bounds their scores with the keys of one list.

    With ``k = centroid + r`` and ``q = centroid + p`` scores are made of ``p.r`` and of what depends on one of them
    alone: ``-|q - k|^2 = 2 p.r - |r|^2 - |p|^2`` and ``q.k = p.r + centroid.r + q.centroid``. In ``p.r`` the columns up
    to ``width`` are multiplied as rounded numbers and the others bounded by lengths (Cauchy and Schwarz), so that every
    score is at most ``raw * scale + residual * |r_residual| + (bias of the key) + shift``.

    Args:
        query_ND: rotated queries; ``row_Q`` of them are wanted.
        centroid_D: rotated centroid of the list.
        largest: of the list's keys: lengths of the longest ``r`` as rounded, of the longest ``r``, of the largest
            rounding error, the largest size of a bias.
        levels: the largest integer that queries are rounded to; 0 if they are not rounded.
        quantized_QE: gets them plus ``zero``, or the queries as they are.
        bound_Q4: gets scale, residual, shift, and the part of the shift that errors may come to: a score is below its
            bound by twice that and twice ``residual * |r_residual|`` at most.
    """
    factor = np.float32(2.0) if by_distance else np.float32(1.0)
    longest_quantized, longest, longest_error, largest_bias = largest[0], largest[1], largest[2], largest[3]
    for i in range(len(row_Q)):
        query_D = query_ND[row_Q[i]]
        most, whole, leading, dot_centroid = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for d in range(width):
            x = query_D[d] - centroid_D[d]
            dot_centroid += query_D[d] * centroid_D[d]
            most = max(most, abs(x))
            leading += x * x
        for d in range(width, len(query_D)):
            x = query_D[d] - centroid_D[d]
            dot_centroid += query_D[d] * centroid_D[d]
            whole += x * x
        residual = np.sqrt(whole)
        whole += leading
        leading = np.sqrt(leading)
        step, error = np.float32(1.0), np.float32(0.0)
        if levels > 0:
            step = max(most, np.float32(1e-30)) / levels
            for d in range(width):
                x = query_D[d] - centroid_D[d]
                rounded = np.rint(x / step)
                quantized_QE[i, d] = np.int8(np.int32(rounded) + zero)
                error += (x - rounded * step) * (x - rounded * step)
            error = np.sqrt(error)
        else:
            for d in range(width):
                quantized_QE[i, d] = query_D[d] - centroid_D[d]
        shift = -whole if by_distance else dot_centroid
        size = np.sqrt(whole)
        slack = factor * (leading * longest_error + error * longest_quantized)
        slack += _ROUNDING * (factor * size * longest + largest_bias + abs(shift))
        bound_Q4[i, 0], bound_Q4[i, 1], bound_Q4[i, 2] = factor * step, factor * residual, shift + slack
        bound_Q4[i, 3] = slack


# Groups are rows of a matrix: a slice would be counted in and out of use, which takes longer than passing over it.
@compiled(fastmath={"contract"})
def _flag_groups(
    raw_GP: Any, residual_GP: Any, bias_GP: Any, scale: Any, residual: Any, reach: Any, flag_G: Any
) -> int:
    """List the groups with bounds that reach ``reach``. Returns: how many there are."""
    count = 0
    for group in range(len(raw_GP)):
        reached = np.int32(0)
        for i in range(GROUP):
            bound = np.float32(raw_GP[group, i]) * scale + (residual_GP[group, i] * residual + bias_GP[group, i])
            reached += np.int32(bound >= reach)
        flag_G[count] = group
        count += reached > 0
    return count


@compiled(fastmath={"contract"})
def _list_bounds(
    raw_GP: Any,
    residual_GP: Any,
    bias_GP: Any,
    group: int,
    scale: Any,
    residual: Any,
    reach: Any,
    below: Any,
    hit_P: Any,
) -> int:
    """Places in a group of the bounds that reach ``reach`` and not ``below``; without a branch for each."""
    count = 0
    for i in range(GROUP):
        bound = np.float32(raw_GP[group, i]) * scale + (residual_GP[group, i] * residual + bias_GP[group, i])
        hit_P[count] = i
        count += (bound >= reach) & (bound < below)
    return count


@compiled()
def _score(query_D: Any, key_D: Any, by_distance: bool) -> Any:
    return neg_sq_l2(query_D, key_D) if by_distance else dot(query_D, key_D)


@compiled(fastmath={"contract"})
def _fill_bounds(
    raw_GP: Any, residual_GP: Any, bias_GP: Any, scale: Any, residual: Any, num_groups: int, every: int, bound_F: Any
) -> None:
    """Write the bounds of every so manieth group."""
    for at in range(num_groups // every):
        group = at * every
        for i in range(GROUP):
            bound = np.float32(raw_GP[group, i]) * scale + (residual_GP[group, i] * residual + bias_GP[group, i])
            bound_F[at * GROUP + i] = bound


@compiled()
def _promising(
    raw_GP: Any, residual_GP: Any, bias_GP: Any, scale: Any, residual: Any, num_rows: int, wanted: int, bound_F: Any
) -> Any:
    """A number that the bounds of at least so many keys reach (nearly always), and of few more; or all."""
    if num_rows <= wanted:
        return LOWEST
    every = 4 if wanted >= 32 and num_rows >= 16 * wanted else 1  # a sample estimates it well enough
    num_groups = num_rows // GROUP if every > 1 else len(raw_GP)
    _fill_bounds(raw_GP, residual_GP, bias_GP, scale, residual, num_groups, every, bound_F)
    num_bounds = num_groups // every * GROUP if every > 1 else num_rows
    share = wanted // every + wanted // 8 if every > 1 else wanted
    # Minus infinity is the bound of deleted keys, and of places without a key: nothing may reach it.
    return max(LOWEST, approx_kth_largest(bound_F[:num_bounds], share))


@compiled()
def _drop_below(score_C: Any, ids_C: Any, order_C: Any, filled: int, lowest: Any) -> int:
    kept = 0
    for i in range(filled):
        score_C[kept], ids_C[kept], order_C[kept] = score_C[i], ids_C[i], order_C[i]
        kept += score_C[i] >= lowest
    return kept


@compiled()
def _keep_first(score_C: Any, ids_C: Any, order_C: Any, filled: int, k: int) -> int:
    """Keep the k best candidates; of equals those with the lowest ids."""
    edge = np.partition(score_C[:filled], filled - k)[filled - k]
    missing = k
    for i in range(filled):
        missing -= score_C[i] > edge
    ties = np.sort(ids_C[:filled][score_C[:filled] == edge])
    last, kept = ties[missing - 1], 0
    for i in range(filled):
        score_C[kept], ids_C[kept], order_C[kept] = score_C[i], ids_C[i], order_C[i]
        kept += score_C[i] > edge or (score_C[i] == edge and ids_C[i] <= last)
    return kept


@compiled()
def prune_candidates(
    score_C: Any, ids_C: Any, order_C: Any, filled: int, k: int, threshold: Any, doubt: Any, ties_by_id: bool
) -> tuple[int, Any]:
    """Drop candidates that cannot be among the k best. Returns: how many are left, and the risen threshold."""
    if filled >= k:
        threshold = max(threshold, approx_kth_largest(score_C[:filled], k))
    filled = _drop_below(score_C, ids_C, order_C, filled, threshold - doubt)
    if ties_by_id and filled > len(score_C) - GROUP:
        filled = _keep_first(score_C, ids_C, order_C, filled, k)
    return filled, threshold


@compiled(
    f"(i4[:,:,::1], f4, {_QUERIES}, {_KEYS}, {_HEAP}, b1, i8, f4[::1])",
    f"(f4[:,:,::1], f4, {_QUERIES}, {_KEYS}, {_HEAP}, b1, i8, f4[::1])",
)
def scan(
    raw_QGP: Any,
    step: Any,
    queries: Any,
    keys: Any,
    heap: Any,
    by_distance: bool,
    k: int,
    bound_F: Any,
) -> None:
    """Put every key of a list that could be among the k best of a query after its candidates, with its true score.

    Args:
        raw_QGP: products of the rounded vectors, a unit of which is ``step`` times the query's scale; keys are in
            groups of P = GROUP neighbours, those after the list's last mean nothing.
        queries, keys, heap: ``ScannedQueries``, ``ScannedKeys`` and ``CandidateHeap`` as plain tuples: numba takes 5 us
            to recognise a named one, which is 3% of a search in bulk.
        bound_F: room for the bounds of one query.
    """
    query_ND, row_Q, order_Q, bound_Q4 = queries
    residual_GP, bias_GP, ids_M, keys_MD = keys
    score_NC, ids_NC, order_NC, filled_N, threshold_N, doubt_N, is_open_N = heap
    num_rows = len(ids_M)
    room = score_NC.shape[1]
    hit_P, flag_G = np.empty(GROUP, np.int64), np.empty(len(residual_GP), np.int64)
    for q in range(len(row_Q)):
        n = row_Q[q]
        if is_open_N[n]:
            continue
        raw_GP, scale, residual, shift = raw_QGP[q], bound_Q4[q, 0] * step, bound_Q4[q, 1], bound_Q4[q, 2]
        score_C, ids_C, order_C, query_D = score_NC[n], ids_NC[n], order_NC[n], query_ND[n]
        filled, threshold, doubt = filled_N[n], threshold_N[n], doubt_N[n]
        reach, scored = threshold - doubt - shift, np.float32(np.inf)  # keys whose bounds reach this have been scored
        is_first = threshold <= LOWEST and filled < k
        if is_first:
            # Those that promise most give the query its threshold.
            reach = _promising(raw_GP, residual_GP, bias_GP, scale, residual, num_rows, k - filled, bound_F)
        flagged, at = _flag_groups(raw_GP, residual_GP, bias_GP, scale, residual, reach, flag_G), 0
        while at < flagged:
            group = flag_G[at]
            if filled > room - GROUP:
                filled, threshold = prune_candidates(score_C, ids_C, order_C, filled, k, threshold, doubt, False)
                if filled > room - GROUP:
                    is_open_N[n] = True
                    break
                if not is_first:
                    reach = threshold - doubt - shift
            hits = _list_bounds(raw_GP, residual_GP, bias_GP, group, scale, residual, reach, scored, hit_P)
            for hit in range(hits):
                i = group * GROUP + hit_P[hit]
                score_C[filled] = _score(query_D, keys_MD[i], by_distance)
                ids_C[filled], order_C[filled] = ids_M[i], order_Q[q] + i
                filled += score_C[filled] >= threshold - doubt
            at += 1
            if is_first and at == flagged:
                if filled >= k:
                    threshold = max(threshold, approx_kth_largest(score_C[:filled], k))
                if reach > LOWEST:  # once more, for those that promised less
                    is_first, scored, reach = False, reach, threshold - doubt - shift
                    flagged, at = _flag_groups(raw_GP, residual_GP, bias_GP, scale, residual, reach, flag_G), 0
        filled_N[n], threshold_N[n] = filled, threshold


@compiled(f"({_HEAP}, i8)")
def prune_group(heap: Any, k: int) -> None:
    """Drop the candidates of every query that cannot be among its k best; ``heap`` as in :func:`scan`."""
    score_NC, ids_NC, order_NC, filled_N, threshold_N, doubt_N, _ = heap
    for n in range(len(filled_N)):
        filled_N[n], threshold_N[n] = prune_candidates(
            score_NC[n], ids_NC[n], order_NC[n], filled_N[n], k, threshold_N[n], doubt_N[n], False
        )


@compiled("(f4[:,::1], i8[:,::1], i8[:,::1], i8[::1])")
def order_equals(score_NC: Any, ids_NC: Any, order_NC: Any, filled_N: Any) -> None:
    """Bring candidates of equal scores into the order of their ids; the scores are falling already."""
    for n in range(len(filled_N)):
        score_C, ids_C, order_C = score_NC[n], ids_NC[n], order_NC[n]
        first = 0
        while first < filled_N[n]:
            after = first + 1
            while after < filled_N[n] and score_C[after] == score_C[first]:
                after += 1
            if after - first > 1:
                by_id = np.argsort(ids_C[first:after])
                ids_C[first:after] = ids_C[first:after][by_id]
                order_C[first:after] = order_C[first:after][by_id]
            first = after


@compiled("(f4[:,::1], i8[:,::1], i8[:,::1], i8[::1], i8, i8[::1], b1)")
def settle_ties(
    score_NC: Any, ids_NC: Any, order_NC: Any, filled_N: Any, k: int, row_H: Any, by_distance: bool
) -> None:
    """Of candidates that tie for the last places take those that faiss would have kept.

    faiss scans keys one after the other and keeps k of them; one that is as far as the farthest kept is skipped,
    and a closer one takes the place of the farthest: of several it is the one with the highest id where distances are
    compared, with the lowest where products are.

    Args:
        score_NC: candidates of each query, best first, of equals the lowest id first; ``order_NC`` is the order in
            which faiss scans them.
        row_H: queries whose candidates at places k - 1 and k are equal. Those places get the right ids.
    """
    for h in range(len(row_H)):
        score_C, order_C, ids_C = score_NC[row_H[h]], order_NC[row_H[h]], ids_NC[row_H[h]]
        first, after = k - 1, k
        while first > 0 and score_C[first - 1] == score_C[k - 1]:
            first -= 1
        while after < filled_N[row_H[h]] and score_C[after] == score_C[k - 1]:
            after += 1
        tied = np.empty(after - first, np.int64)  # places of those kept; the lower place has the lower id
        kept = better = 0
        for at in np.argsort(order_C[:after]):
            if at < first:
                better += 1
                if kept + better > k:
                    last = 0
                    for j in range(kept):
                        if (tied[j] > tied[last]) == by_distance:
                            last = j
                    tied[last] = tied[kept - 1]
                    kept -= 1
            elif kept + better < k:
                tied[kept] = at
                kept += 1
        kept_places = np.sort(tied[:kept])
        ids_C[first : first + kept] = ids_C[kept_places].copy()

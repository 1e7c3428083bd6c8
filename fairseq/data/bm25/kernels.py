"""The loops of ``index.py``, compiled by numba. Import this module where it is used: numba takes half a second to load.

Shapes: V terms, D documents, P postings (a term's documents and weights; by document, its terms and weights), T terms
of a query.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairseq.memory.index.ops.kernels import approx_kth_largest, compiled

_GROWTH = 1.5
"""Postings between two looks at what can still be found grow by this factor, so that the looks take a small share."""
_EPSILON = 2.0**-23


@compiled("(i8[::1], i4[::1], f4[::1], i8[::1], i4[::1], f4[::1])")
def transpose(starts_V: Any, document_P: Any, weight_P: Any, end_D: Any, term_P: Any, own_weight_P: Any) -> None:
    """Sort postings by document; terms of a document come in rising order.

    Args:
        end_D: start of each document's postings; becomes their end.
        term_P, own_weight_P: written.
    """
    for term in range(len(starts_V) - 1):
        for i in range(starts_V[term], starts_V[term + 1]):
            place = end_D[document_P[i]]
            term_P[place], own_weight_P[place] = term, weight_P[i]
            end_D[document_P[i]] = place + 1


@compiled("(i8[::1], i4[::1], f4[::1], i8[::1], f8[::1], f8[::1], i8, i8, f4[::1], i4[::1])")
def candidates(
    starts_V: Any, document_P: Any, weight_P: Any, term_T: Any, count_T: Any, bound_T: Any, own: int, k: int,
    score_D: Any, candidate_D: Any,
) -> int:  # fmt: skip
    """Documents among which the k best of a query are; their number.

    Terms are added one after the other. Those that are left add at most the sum of their bounds to any document: once
    few documents can still reach the k-th best, scoring these alone takes less time than reading on.

    Args:
        term_T: the most valuable first: those that add much and are in few documents.
        bound_T: the most that a term adds to a document.
        own: document that is not looked for.
        score_D: room.
        candidate_D: the documents are written here, in rising order.
    """
    num_terms, num_documents = len(term_T), len(score_D)
    left_bound, left_postings = 0.0, 0
    for t in range(num_terms):
        left_bound += bound_T[t]
        left_postings += starts_V[term_T[t] + 1] - starts_V[term_T[t]]
    postings_each = len(document_P) / num_documents
    score_D[:] = np.float32(0.0)
    score_D[own] = np.float32(-np.inf)
    read, next_look = 0, num_documents
    # Sums of float32 differ from the sums of these numbers by less than this share: all terms are positive.
    share = (num_terms + 4) * _EPSILON
    for t in range(num_terms):
        start, end = starts_V[term_T[t]], starts_V[term_T[t] + 1]
        count = np.float32(count_T[t])
        for i in range(start, end):
            score_D[document_P[i]] += count * weight_P[i]
        read, left_postings, left_bound = read + end - start, left_postings - (end - start), left_bound - bound_T[t]
        if read < next_look or t == num_terms - 1:
            continue
        next_look = np.int64(read * _GROWTH)
        least = (approx_kth_largest(score_D, k) * (1.0 - share) - left_bound * (1.0 + _EPSILON)) / (1.0 + share)
        if least > 0.0 and _num_reaching(score_D, np.float32(least)) * postings_each < left_postings:
            return _reaching(score_D, np.float32(least), candidate_D)
    least = approx_kth_largest(score_D, k) * (1.0 - share) / (1.0 + share)
    return _reaching(score_D, np.float32(max(least, 1e-30)), candidate_D)


@compiled()
def _num_reaching(score_D: Any, least: Any) -> Any:
    count = np.int32(0)
    for d in range(len(score_D)):
        count += np.int32(score_D[d] >= least)
    return count


@compiled()
def _reaching(score_D: Any, least: Any, candidate_D: Any) -> int:
    count = 0
    for d in range(len(score_D)):
        if score_D[d] >= least:
            candidate_D[count] = d
            count += 1
    return count


@compiled("(i8[::1], i4[::1], f4[::1], i8[::1], f8[::1], i4[::1], f4[::1], f8[::1])")
def score(
    starts_D: Any, term_P: Any, weight_P: Any, term_T: Any, count_T: Any, candidate_C: Any, count_V: Any, score_C: Any
) -> None:
    """Scores of some documents, each summed in the order of its terms, so that equal documents have equal scores.

    Args:
        count_V: zeros; they are zeros again afterwards.
        score_C: written.
    """
    for t in range(len(term_T)):
        count_V[term_T[t]] = np.float32(count_T[t])
    for c in range(len(candidate_C)):
        total = 0.0
        for i in range(starts_D[candidate_C[c]], starts_D[candidate_C[c] + 1]):
            total += np.float64(count_V[term_P[i]]) * np.float64(weight_P[i])
        score_C[c] = total
    for t in range(len(term_T)):
        count_V[term_T[t]] = np.float32(0.0)

"""Exact match and ROUGE of texts that a model wrote."""

from __future__ import annotations

from collections.abc import Sequence

_ROUGE = ("rouge1", "rouge2", "rougeL")


def exact_match(system: Sequence[str], reference: Sequence[str]) -> float:
    """Percentage of texts that equal their reference, white space at the ends aside.

    Raises: ValueError for no texts, or different numbers of them.
    """
    return 100.0 * sum(one.strip() == other.strip() for one, other in _paired(system, reference)) / len(system)


def rouge(system: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): the mean of the texts' F-measures in percent, by rouge-score, unstemmed.

    Raises: ValueError when rouge-score is missing, and as ``exact_match``.
    """
    pairs = _paired(system, reference)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score: pip install 'fairseq-memory[hf]'") from None
    scorer = RougeScorer(list(_ROUGE))
    scores = [scorer.score(other, one) for one, other in pairs]
    return {name: 100.0 * sum(score[name].fmeasure for score in scores) / len(scores) for name in _ROUGE}


def _paired(system: Sequence[str], reference: Sequence[str]) -> list[tuple[str, str]]:
    if not len(system) or len(system) != len(reference):
        raise ValueError(f"{len(system)} texts and {len(reference)} references; there must be one of each, and some")
    return list(zip(system, reference))

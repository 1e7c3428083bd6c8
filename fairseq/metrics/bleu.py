"""BLEU, chrF++ and TER of translations, as sacrebleu computes them (arXiv 1804.08771), and fairseq's line for BLEU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def token_bleu(system: Sequence[str], reference: Sequence[str], *, order: int = 4, ignore_case: bool = False) -> Any:
    """BLEU of sentences whose tokens are separated by blanks, unsmoothed; a score of sacrebleu.

    Args:
        order: longest n-grams that are compared.
    Raises: ValueError for different numbers of sentences.
    """
    return _token_metric(order, ignore_case, "none").corpus_score(*_paired(system, reference))


def sentence_bleus(
    system: Sequence[str], reference: Sequence[str], *, order: int = 4, ignore_case: bool = False
) -> list[Any]:
    """BLEU of each sentence; one is added to the counts of n-grams of two and more tokens (Lin and Och, 2004).

    Raises: ValueError for different numbers of sentences.
    """
    metric = _token_metric(order, ignore_case, "add-k")
    _paired(system, reference)
    return [metric.corpus_score([one], [[other]]) for one, other in zip(system, reference)]


def bleu_line(score: Any) -> str:
    """A BLEU score in fairseq's words."""
    order, length = len(score.precisions), max(score.ref_len, 1)
    precisions = "/".join(f"{precision:.1f}" for precision in score.precisions)
    return (
        f"BLEU{order} = {score.score:.2f}, {precisions} (BP={score.bp:.3f}, ratio={score.sys_len / length:.3f}, "
        f"syslen={score.sys_len}, reflen={score.ref_len})"
    )


def _token_metric(order: int, ignore_case: bool, smooth: str) -> Any:
    bleu = importlib.import_module("sacrebleu.metrics").BLEU  # takes longer to import than to use
    return bleu(
        lowercase=ignore_case,
        tokenize="none",
        force=True,
        max_ngram_order=order,
        smooth_method=smooth,
        smooth_value=1 if smooth == "add-k" else None,
    )


def _paired(system: Sequence[str], reference: Sequence[str]) -> tuple[Sequence[str], list[Sequence[str]]]:
    if len(system) != len(reference):
        raise ValueError(
            f"the system's text has {len(system)} sentences, the reference {len(reference)}; they must be the same ones"
        )
    return system, [reference]


@dataclass(frozen=True)
class TextScores:
    """Scores of translations as text."""

    lines: tuple[str, ...]
    """The first in fairseq's words, others with sacrebleu's signatures."""
    figures: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict)
    """How sacrebleu computed each figure."""


SCORINGS = ("bleu", "sacrebleu", "chrf", "ter")


def score_texts(scoring: str, system: Sequence[str], reference: Sequence[str]) -> TextScores:
    """Score whole texts.

    Args:
        scoring: ``bleu`` compares tokens as they are, the others detokenised text: ``sacrebleu`` gives BLEU, chrF++ and
            TER, ``chrf`` and ``ter`` one of them.
    Raises: ValueError for different numbers of sentences.
    """
    if scoring == "bleu":
        score = token_bleu(system, reference)
        return TextScores((bleu_line(score),), {"bleu": score.score})
    library = importlib.import_module("sacrebleu.metrics")
    metrics = {"bleu": library.BLEU(), "chrf++": library.CHRF(word_order=2), "ter": library.TER()}
    wanted = {"sacrebleu": tuple(metrics), "chrf": ("chrf++",), "ter": ("ter",)}[scoring]
    lines: list[str] = []
    figures: dict[str, float] = {}
    signatures: dict[str, str] = {}
    system, references = _paired(system, reference)
    for name in wanted:
        score = metrics[name].corpus_score(system, references)
        figures[name] = score.score
        signatures[name] = f"{score.name}|{metrics[name].get_signature()}"
        lines += [score.format(), signatures[name]]
    return TextScores(tuple(lines), figures, signatures)


@dataclass(frozen=True)
class Compared:
    """BLEU of a system beside a baseline's, by paired bootstrap over sentences."""

    bleu: float
    baseline: float
    interval: float
    """Half of the system's 95% interval."""
    p_value: float
    """How often a difference as large arises between resamples if there is none."""


def paired_bootstrap(system: Sequence[str], baseline: Sequence[str], reference: Sequence[str]) -> Compared:
    """Compare two translations of detokenised text: 1,000 resamples, sacrebleu's fixed seed (Koehn 2004).

    Raises: ValueError for different numbers of sentences.
    """
    system, references = _paired(system, reference)
    baseline, references = _paired(baseline, reference)
    metrics = {"BLEU": importlib.import_module("sacrebleu.metrics").BLEU()}
    test = importlib.import_module("sacrebleu.significance").PairedTest
    systems = [("baseline", baseline), ("system", system)]
    found = test(systems, metrics, references, test_type="bs", n_samples=1000)()[1]["BLEU"]
    bleu, other = found[1].score, found[0].score
    # sacrebleu counts strictly larger differences only, so that a system is "better" than its own copy.
    return Compared(bleu, other, found[1].ci, 1.0 if bleu == other else found[1].p_value)


_ORDERS = range(1, 5)


def bleu_counts(system: Sequence[str], reference: Sequence[str], *, tokenize: str) -> dict[str, float]:
    """What BLEU is computed from, to be summed over parts of a text.

    Args:
        tokenize: sacrebleu's tokenizer, or ``none`` for text whose tokens are separated by blanks.
    """
    score = importlib.import_module("sacrebleu.metrics").BLEU(tokenize=tokenize, force=True)
    found = score.corpus_score(*_paired(system, reference))
    counts = {f"bleu_hits_{n}": float(found.counts[n - 1]) for n in _ORDERS}
    counts |= {f"bleu_ngrams_{n}": float(found.totals[n - 1]) for n in _ORDERS}
    return counts | {"bleu_sys_len": float(found.sys_len), "bleu_ref_len": float(found.ref_len)}


def bleu_of_counts(counts: Mapping[str, float]) -> float:
    """BLEU of summed counts, smoothed as sacrebleu smooths that of a text."""
    hits, ngrams = ([int(counts[f"bleu_{kind}_{n}"]) for n in _ORDERS] for kind in ("hits", "ngrams"))
    compute = importlib.import_module("sacrebleu.metrics").BLEU.compute_bleu
    lengths = {"sys_len": int(counts["bleu_sys_len"]), "ref_len": int(counts["bleu_ref_len"])}
    return float(compute(hits, ngrams, **lengths, smooth_method="exp").score)

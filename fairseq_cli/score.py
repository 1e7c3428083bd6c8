"""``score.py`` and ``fairseq-score``: BLEU of a translation against a reference, one sentence a line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fairseq.config import FlagParser, build, flag, require_at_least
from fairseq_cli.entry import run


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of scoring."""

    sys: str = flag("-s", "--sys", default="-")
    """Translation, one sentence a line; - for standard input."""
    ref: str | None = flag("-r", "--ref", default=None)
    """Reference, one sentence a line."""
    order: int = flag("-o", "--order", default=4)
    """Longest n-grams that are compared."""
    ignore_case: bool = flag("--ignore-case", default=False)
    """Compare in lower case."""
    sacrebleu: bool = flag("--sacrebleu", default=False)
    """Score detokenised text with sacrebleu's own tokenizer; by default tokens are what blanks separate."""
    sentence_bleu: bool = flag("--sentence-bleu", default=False)
    """Score each sentence, with one added to the counts of n-grams of two and more tokens."""
    baseline: str | None = flag("--baseline", default=None)
    """Another translation of the same text: with --sacrebleu, tell whether --sys is better, by paired bootstrap."""

    def __post_init__(self) -> None:
        require_at_least(1, order=self.order)
        if self.ref is None:
            raise ValueError("--ref names no reference; give the file of reference sentences")
        for name, path in (("--sys", self.sys), ("--ref", self.ref), ("--baseline", self.baseline)):
            if path not in (None, "-") and not os.path.isfile(path):
                raise ValueError(f"{name}: no such file: {path}")
        if self.sacrebleu and (self.sentence_bleu or self.order != 4):
            raise ValueError(
                "--sacrebleu scores a whole text by n-grams of up to 4 tokens; leave out --sentence-bleu and --order"
            )
        if self.baseline is not None and not self.sacrebleu:
            raise ValueError("--baseline compares detokenised text; give --sacrebleu too")


def main(argv: Sequence[str]) -> None:
    """Print the score. Raises: ValueError for texts of different numbers of lines."""
    parser = FlagParser("fairseq-score", "Score a translation against a reference by BLEU.")
    parser.add_config(ScoreConfig)
    config = build(ScoreConfig, parser.parse(argv))
    from fairseq.metrics.bleu import bleu_line, paired_bootstrap, sentence_bleus, token_bleu

    system, reference = _lines(config.sys), _lines(str(config.ref))
    baseline = None if config.baseline is None else _lines(config.baseline)
    for name, path, lines in (("--sys", config.sys, system), ("--baseline", config.baseline, baseline)):
        if lines is not None and len(lines) != len(reference):
            raise ValueError(
                f"{name} {path} has {len(lines)} lines, --ref {config.ref} has {len(reference)}; give the same "
                "sentences in the same order"
            )
    if config.sacrebleu:
        metric = importlib.import_module("sacrebleu.metrics").BLEU(lowercase=config.ignore_case)
        print(metric.corpus_score(system, [reference]).format())
        print(metric.get_signature())
        if baseline is not None:
            told = paired_bootstrap(system, baseline, reference)
            print(
                f"{told.bleu:.2f} +- {told.interval:.2f} against {told.baseline:.2f} of {config.baseline}: "
                f"p = {told.p_value:.4f} (paired bootstrap, 1,000 resamples)"
            )
    elif config.sentence_bleu:
        scores = sentence_bleus(system, reference, order=config.order, ignore_case=config.ignore_case)
        for number, score in enumerate(scores):
            print(number, bleu_line(score))
    else:
        print(bleu_line(token_bleu(system, reference, order=config.order, ignore_case=config.ignore_case)))


def _lines(path: str) -> list[str]:
    """The lines of a file, or of standard input; only line feeds end one."""
    if path == "-":
        return sys.stdin.read().removesuffix("\n").split("\n")
    with open(path, encoding="utf-8", newline="\n") as file:
        text = file.read()
    return text.removesuffix("\n").split("\n") if text else []


def cli_main() -> None:
    """Entry point of score.py and fairseq-score."""
    run("fairseq-score", main)


if __name__ == "__main__":
    cli_main()

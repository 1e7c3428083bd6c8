"""The rows of --output-word-stats and --output-word-probs against sums done by hand."""

import math

import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.metrics.perplexity import PerplexityReport


@pytest.fixture
def report():
    """Two blocks: ``the un@@ known the`` and ``known the``, with ln p of 0.5, 0.25, ... by position."""
    dictionary = Dictionary()
    number = {word: dictionary.add_symbol(word) for word in ("the", "un@@", "known")}
    made = PerplexityReport(dictionary, "@@ ")
    for block, words, shares in ((0, "the un@@ known the", (1, 2, 3, 4)), (1, "known the", (5, 6))):
        target = torch.tensor([number[word] for word in words.split()])
        made.add(torch.full_like(target, block), target, torch.tensor(shares) * -math.log(2))
    return made


def test_words_carry_the_sum_of_their_pieces(report):
    found = {
        number: [(word, round(-logp / math.log(2), 4)) for word, logp in words] for number, words in report.words()
    }
    assert found == {0: [("the", 1), ("unknown", 5), ("the", 4)], 1: [("known", 5), ("the", 6)]}


def test_columns_are_fairseqs_word_count_sum_joined_next_sum_next_count(report):
    bits = math.log(2)
    rows = [
        [word, n, logp / -bits, joined, after / -bits, m]
        for word, n, logp, joined, after, m in report.word_statistics()
    ]
    assert rows == [
        ["the", 3, pytest.approx(11), False, pytest.approx(5), 1],
        ["unknown", 1, pytest.approx(5), True, pytest.approx(4), 1],
        ["known", 1, pytest.approx(5), False, pytest.approx(6), 1],
    ]


def test_a_certain_word_is_passed_over_as_the_next_one():
    dictionary = Dictionary()
    a, b, c = (dictionary.add_symbol(word) for word in "abc")
    report = PerplexityReport(dictionary)
    report.add(torch.zeros(3, dtype=torch.int64), torch.tensor([a, b, c]), torch.tensor([-1.0, 0.0, -2.0]))
    assert report.word_statistics()[0] == ("a", 1, -1.0, False, -2.0, 1)


def test_a_loss_beyond_floats_has_infinite_perplexity():
    report = PerplexityReport(Dictionary())
    report.add(torch.zeros(2, dtype=torch.int64), torch.tensor([3, 3]), torch.tensor([-9000.0, -1.0]))
    figures = report.figures(2, 1.0)
    assert figures.perplexity == figures.buckets[0]["perplexity"] == float("inf")
    assert figures.loss_base2 > 1024

"""Mixing in place equals the formulas of fairseq.memory.scoring."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.memory.combiners.vocab_mixing import VocabularyMixer
from fairseq.memory.scoring import interpolate, vocab_logp
from fairseq.memory.types import Candidates


def candidates(rows, count, vocabulary, seed=0):
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(0, vocabulary, (rows, count), generator=made)
    scores = -40.0 * torch.rand(rows, count, generator=made)
    keep = torch.rand(rows, count, generator=made) < 0.8
    return Candidates(values.masked_fill(~keep, -1), scores.masked_fill(~keep, -torch.inf), keep)


@pytest.fixture(params=["compiled", "torch"])
def by(request, monkeypatch):
    if request.param == "torch":  # as on a GPU
        monkeypatch.setattr(VocabularyMixer, "_mix_on_cpu_", VocabularyMixer._mix_anywhere_)


def rounding(vocabulary: int, count: int, size: float) -> float:
    """Bound on the error of a float32 mixture.

    A logarithm is off by what the sum in it is off, relative to it. torch adds up a row in four levels of blocks, so
    that a number goes through 4 * 2^ceil(log2(V) / 4) additions and some 32 between vectors; a share of the neighbours
    through ``count`` in the sum of all and as many in its token's. Every other operation (4 with the scores of the
    model, 4 with those of the neighbours, 4 with logarithms) rounds a number no larger than ``size``; exp, log and
    log1p are within two units, 20 in all.
    """
    sums = 4 * 2 ** math.ceil(math.log2(vocabulary) / 4) + 32 + 2 * count
    return 2.0**-24 * (sums + 12 * size + 20)


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("vocabulary", [7, 1 << 19])
def test_equals_the_formula(by, threads, weight, vocabulary):
    scores = 3.0 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1))
    found = candidates(5, 30, vocabulary)
    truth = Candidates(found.values_NM, found.scores_NM.double(), found.keep_NM)
    expected = interpolate(torch.log_softmax(scores.double(), 1), vocab_logp(truth, vocabulary, 2.0), weight)
    size = max(float(x[x.isfinite()].abs().max()) for x in (scores, found.scores_NM, expected))
    bound = rounding(vocabulary, 30, size)
    mixer = VocabularyMixer(weight, 2.0)
    target = torch.arange(5)
    for _ in range(2):  # what it keeps between calls changes nothing
        mixed = scores.clone()
        logp = mixer.mix_(mixed, None, found, target)
        torch.testing.assert_close(mixed.double(), expected, atol=bound, rtol=0)
        assert torch.equal(logp, mixed[target, target])


def test_other_rows_stay_and_are_normalised_apart():
    scores = torch.randn(6, 9)
    mixed, rows = scores.clone(), torch.tensor([1, 4])
    mixer = VocabularyMixer(0.5)
    mixer.mix_(mixed, rows, candidates(2, 5, 9))
    rest = torch.tensor([0, 2, 3, 5])
    assert torch.equal(mixed[rest], scores[rest])
    mixer.normalize_(mixed, rest)
    torch.testing.assert_close(mixed.logsumexp(1), torch.zeros(6), atol=1e-6, rtol=0)


def test_a_row_without_candidates_is_the_models_alone(by):
    scores = torch.randn(2, 9)
    found = candidates(2, 5, 9)
    found.keep_NM[0] = False
    mixed = scores.clone()
    VocabularyMixer(0.5).mix_(mixed, None, found)
    torch.testing.assert_close(mixed[0], torch.log_softmax(scores[0], 0))
    infinitely_far = Candidates(found.values_NM.clamp(min=0), torch.full((2, 5), -torch.inf), torch.ones(2, 5).bool())
    mixed = scores.clone()
    VocabularyMixer(0.5).mix_(mixed, None, infinitely_far)
    torch.testing.assert_close(mixed, torch.log_softmax(scores, 1))
    none = Candidates(torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0), torch.empty(2, 0, dtype=torch.bool))
    mixed = scores.clone()
    VocabularyMixer(0.5).mix_(mixed, None, none)
    torch.testing.assert_close(mixed, torch.log_softmax(scores, 1))


def test_tokens_beyond_the_vocabulary_are_an_error():
    found = Candidates(torch.tensor([[3, 9]]), torch.zeros(1, 2), torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="1 neighbours hold tokens beyond the vocabulary of 9"):
        VocabularyMixer(0.5).mix_(torch.randn(1, 9), None, found)

"""The distribution of a position, token by token through the combiner, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.combiners.joint import JointNormalization, WholeMemoryAdded
from fairseq.memory.proof import positions
from fairseq.memory.proof.positions import SeenPosition
from fairseq.memory.types import Candidates

V, M, DIM = 37, 11, 4


def offered(seed, kept=M):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.arange(M) < kept
    values = torch.randint(V, (1, M), generator=generator)
    return Candidates(values, torch.randn(1, M, generator=generator), keep[None])


def position(candidates=None, text=(), temperature=1.0):
    scores_V = torch.randn(V, generator=torch.Generator().manual_seed(9))
    return SeenPosition(scores_V.log_softmax(0), scores_V.logsumexp(0), candidates, text, temperature)


def by_hand(seen, external_scale, memories):
    """p of every token by joint normalisation: scores of vocabulary and memories under one sum."""
    weights = (seen.lm_logp_V + seen.norm).exp()
    for found, scale in memories:
        for value, score, keep in zip(found.values_NM[0].tolist(), found.scores_NM[0].tolist(), found.keep_NM[0]):
            weights[value] += math.exp(score / scale) if keep else 0.0
    return weights / weights.sum()


@pytest.mark.parametrize("numbers", [1, 64, 1 << 20])
def test_interpolation_is_a_distribution(numbers, monkeypatch):
    monkeypatch.setattr(positions, "_NUMBERS", numbers)
    seen, combine = position(offered(0, kept=7)), Interpolation(0.3, 2.0)
    assert seen.mass(combine) == pytest.approx(1.0, abs=1e-6)
    shares = torch.softmax(seen.candidates.scores_NM[0, :7] / 2.0, 0)
    p_V = 0.7 * seen.lm_logp_V.exp()
    p_V.index_add_(0, seen.candidates.values_NM[0, :7], 0.3 * shares)
    torch.testing.assert_close(seen.logp(combine, torch.arange(V)).exp(), p_V)


def test_memories_of_the_text_and_of_a_store_under_one_sum():
    local, rolling, external = offered(1, kept=3), offered(2), offered(3)
    seen = position(external, (local, rolling), temperature=1.5)
    combine = JointNormalization(DIM, temperature=1.5)
    p_V = by_hand(seen, None, [(local, 1.5), (rolling, 1.5), (external, 1.5 * DIM**0.5)])
    torch.testing.assert_close(seen.logp(combine, torch.arange(V)).exp(), p_V)
    assert seen.mass(combine) == pytest.approx(1.0, abs=1e-6)


def test_what_sums_to_more_is_seen():
    """What TRIME's translation program adds: its sum is 1 and the model's share of the memory's own sum."""
    seen = position(offered(4))
    share = torch.sigmoid(seen.norm - (seen.candidates.scores_NM / DIM**0.5).logsumexp(1))
    assert seen.mass(WholeMemoryAdded(DIM)) == pytest.approx(1.0 + float(share), abs=1e-5)


def test_a_model_alone_and_empty_memories():
    assert position().mass(None) == pytest.approx(1.0, abs=1e-6)
    nothing = Candidates(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0), torch.zeros(1, 0).bool())
    assert position(text=(nothing,)).mass(JointNormalization(DIM)) == pytest.approx(1.0, abs=1e-6)
    none_kept = offered(5, kept=0)
    assert position(none_kept).mass(JointNormalization(DIM, weight=0.2)) == pytest.approx(1.0, abs=1e-6)


def test_what_rounds_in_float32_sums_to_one_in_float64():
    """Scores in the tens of thousands, whose last digits float32 drops."""
    scores_1M = -30000.0 - torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) * 3
    found = Candidates(torch.arange(40)[None] % 7, scores_1M, torch.ones(1, 40, dtype=torch.bool))
    position = SeenPosition(torch.full((7,), -math.log(7.0)), torch.tensor(2.0), found)
    assert 1e-5 < abs(position.mass(Interpolation(0.9)) - 1.0) < 1e-2
    assert position.wide().mass(Interpolation(0.9)) == pytest.approx(1.0, abs=1e-6)

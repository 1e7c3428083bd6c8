from __future__ import annotations

import math

import pytest
import torch

from fairseq.memory.proof.budget import Budget
from fairseq.memory.proof.config import ProofConfig
from fairseq.memory.proof.tally import CausalityTally, MassTally, OrderTally


def test_mass_passes_within_the_tolerance_of_the_precision():
    tally = MassTally(masses=[1.0, 1.0 + 9e-6], differences=[0.0])
    assert tally.verdict().passed
    tally.masses.append(1.0 + 2e-5)
    assert tally.verdict().passed is False
    assert "at worst 1.00002" in tally.verdict().words
    assert MassTally(in_half=True, masses=[1.005]).verdict().passed
    assert MassTally().verdict().passed is None


def test_what_float32_rounds_is_summed_again():
    tally = MassTally()
    tally.add(1.0 + 9e-6, lambda: pytest.fail("it is within the tolerance"))
    tally.add(1.0 + 5e-4, lambda: 1.0)
    assert tally.verdict().passed
    assert "1 in float64: in float32 they round by up to 5.0e-04" in tally.verdict().words
    for mass, wide in ((1.002, 1.0), (1.0 + 5e-4, 1.0 + 5e-4), (math.nan, 1.0)):  # too much, or no rounding at all
        failing = MassTally()
        failing.add(mass, lambda wide=wide: wide)
        assert failing.verdict().passed is False


def test_scores_of_another_distribution_fail():
    assert MassTally(masses=[1.0], differences=[2e-4]).verdict().passed is False


def test_a_sum_that_is_no_number_fails():
    verdict = MassTally(masses=[1.0, math.nan]).verdict()
    assert verdict.passed is False
    assert "at worst nan" in verdict.words


def test_causality_is_bit_for_bit_unless_rounding_is_allowed():
    exact, rounded = CausalityTally(num_cuts=1), CausalityTally(1e-4, num_cuts=1)
    before = torch.tensor([-math.inf, 1.0, 50.0])
    for tally in (exact, rounded):
        tally.compare("the score", before, before.clone())
        assert tally.verdict().passed
        tally.compare("the score", before, before + torch.tensor([0.0, 0.0, 1e-3]))
    assert exact.verdict().passed is False
    assert rounded.verdict().passed  # 1e-3 of 50 is within 1e-4 of it
    rounded.compare("the key", torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 1e-3], [0.0, 0.0]]))
    assert rounded.verdict().passed is False
    assert "the key 1 positions before the change" in rounded.verdict().words


@pytest.mark.parametrize("after", [math.nan, math.inf, -math.inf])
def test_numbers_that_become_none_are_changes(after):
    tally = CausalityTally(1e-4, num_cuts=1)
    tally.compare("the score", torch.tensor([0.0]), torch.tensor([after]))
    assert tally.verdict().passed is False


def test_order_knows_what_stands_before():
    past, more = torch.tensor([1, 2, 3, 4, 256, 256]), torch.tensor([9, 8])
    good, bad = OrderTally(), OrderTally()
    for visible in ([], [3, 4], [1, 2, 3, 4, 256, 256], [8]):
        good.see(torch.tensor(visible, dtype=torch.int64), [more, past], "at token 0")
    assert good.verdict().passed
    for visible in ([4, 3], [6, 7], [1]):  # the bytes of 256 256 hold those of 1, shifted
        bad.see(torch.tensor(visible), [past[1:]], "at token 5 of block 2")
    assert len(bad.wrong) == 3
    assert "1 tokens offered at token 5 of block 2 do not stand so" in bad.wrong[2]


def test_a_store_that_grows_fails():
    tally = OrderTally()
    tally.see_store("store", 10, 10, 9)
    assert tally.verdict().passed
    tally.see_store("store", 10, 10, 10)
    assert tally.verdict().passed is False
    assert OrderTally().verdict().passed is None


@pytest.mark.parametrize("value", ["0", "-3", "some", "1.5", ""])
def test_impossible_numbers_of_positions(value):
    with pytest.raises(ValueError, match="neither a number of positions"):
        ProofConfig(prove=value)


def test_a_number_of_positions_is_spread_over_the_steps():
    budget = Budget(ProofConfig(prove="50"), 20)
    counts = [budget.count(step) for step in range(20)]
    assert sum(counts) == 50
    assert sum(count > 0 for count in counts) > 10


def test_time_is_kept_to_its_share():
    now = [0.0]
    budget = Budget(ProofConfig(prove="sample"), 1000, clock=lambda: now[0])
    for step in range(1000):
        if budget.count(step):
            with budget:
                now[0] += 0.05
                budget.num_positions += 1
        now[0] += 0.1
    assert budget.num_positions > 10
    assert budget.share() < 0.02
    assert budget.share() == pytest.approx(budget.num_positions * 0.05 / now[0])


def test_what_is_left_at_the_end_pays_for_more_positions():
    now = [0.0]
    budget = Budget(ProofConfig(prove="sample"), 1, clock=lambda: now[0])
    now[0] = 10.0
    with budget:  # no position: texts are compared
        now[0] += 0.1
    assert not budget.has_rest(), "what a position costs is not known yet"
    count = 0
    with budget:
        now[0] += 0.01
        budget.num_positions += 1
    while budget.has_rest():
        with budget:
            now[0] += 0.01
            budget.num_positions += 1
        count += 1
    assert count == 6
    assert budget.share() < 0.018

"""The formulas against plain probabilities in float64, computed by counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.memory import scoring
from fairseq.memory.types import Candidates, LogSums

V = 7


def candidates(seed: int, n: int, m: int, shared: bool = False, keep: float = 0.7) -> Candidates:
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, V, (1 if shared else n, m), generator=g)
    scores = torch.randn(n, m, generator=g, dtype=torch.float64) * 5
    return Candidates(values, scores, torch.rand(n, m, generator=g) < keep)


def any_candidates(test):
    """Few or none, the same for all rows or not, at several temperatures."""
    drawn = given(
        seed=st.integers(0, 10_000),
        m=st.integers(0, 9),
        shared=st.booleans(),
        temperature=st.sampled_from([0.5, 1.0, 10.0]),
    )
    return settings(max_examples=30, deadline=None)(drawn(test))


def counted(found: Candidates, temperature: float) -> torch.Tensor:
    """(N, V) sums of exp(score / temperature), one candidate at a time."""
    sums = torch.zeros(found.scores_NM.shape[0], V, dtype=torch.float64)
    for n in range(sums.shape[0]):
        for m in range(found.scores_NM.shape[1]):
            if found.keep_NM[n, m]:
                value = found.values_NM[0 if found.values_NM.shape[0] == 1 else n, m]
                sums[n, value] += math.exp(found.scores_NM[n, m] / temperature)
    return sums


@any_candidates
def test_knn_logp_is_the_share_of_the_neighbours_that_hold_the_target(seed, m, shared, temperature):
    found = candidates(seed, 4, m, shared)
    target = torch.randint(0, V, (4,), generator=torch.Generator().manual_seed(seed))
    sums = counted(found, temperature)
    expected = (sums / sums.sum(1, keepdim=True).clamp_min(1e-300))[torch.arange(4), target].log()
    torch.testing.assert_close(scoring.knn_logp(found, target, temperature), expected)


@any_candidates
def test_vocabulary_view_agrees_with_the_target_view(seed, m, shared, temperature):
    found = candidates(seed, 3, m, shared)
    whole = scoring.vocab_logp(found, V, temperature)
    lm = torch.randn(3, V, dtype=torch.float64).log_softmax(1)
    norm = torch.randn(3, dtype=torch.float64)
    joint = scoring.joint_vocab_logp(lm, norm, found, temperature)
    for token in range(V):
        target = torch.full((3,), token)
        torch.testing.assert_close(whole[:, token], scoring.knn_logp(found, target, temperature))
        scores, same = found.scores_NM / temperature, found.same_token(target)
        expected = scoring.joint_logp(lm[:, token], norm, scores, found.keep_NM, same)
        torch.testing.assert_close(joint[:, token], expected)
    torch.testing.assert_close(joint.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_vocabulary_view_keeps_tokens_far_below_the_best():
    found = Candidates(torch.tensor([[1, 2]]), torch.tensor([[0.0, -500.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert scoring.vocab_logp(found, V, 1.0)[0, 2] == scoring.knn_logp(found, torch.tensor([2]), 1.0) == -500.0


def test_missing_neighbours_have_no_weight():
    """An id of -1 carries no value: a mask of False wins over any value and score (fault of the originals)."""
    keep = torch.tensor([[True, False], [False, False]])
    found = Candidates(torch.tensor([[3, -1], [-1, -1]]), torch.tensor([[-2.0, -torch.inf], [5.0, torch.nan]]), keep)
    logp = scoring.knn_logp(found, torch.tensor([3, -1]), 1.0)
    assert logp.tolist() == [0.0, -torch.inf]
    whole = scoring.vocab_logp(found, V, 1.0)
    assert whole[0, 3] == 0.0
    assert torch.isneginf(whole[1]).all()


def test_empty_row_has_zero_gradient():
    scores = torch.randn(2, 3, requires_grad=True)
    keep = torch.tensor([[True, True, False], [False, False, False]])
    out = scoring.masked_logsumexp(scores, keep)
    assert torch.isneginf(out[1])
    out.sum().backward()
    assert scores.grad[1].tolist() == [0.0, 0.0, 0.0]
    assert scores.grad[0, 2] == 0.0
    assert scores.grad[0, :2].sum() == pytest.approx(1.0)


def test_joint_equals_a_softmax_over_vocabulary_and_memory():
    logits = torch.randn(5, V, dtype=torch.float64)
    found = candidates(3, 5, 6)
    target = torch.tensor([0, 1, 2, 3, 4])
    whole = torch.cat([logits, found.scores_NM.masked_fill(~found.keep_NM, -torch.inf)], 1).softmax(1)
    hit = torch.nn.functional.one_hot(target, V).bool()
    expected = (whole * torch.cat([hit, found.same_token(target)], 1)).sum(1).log()
    norm = logits.logsumexp(1)
    lm = logits.log_softmax(1)[torch.arange(5), target]
    nll = scoring.joint_nll(lm, norm, found.scores_NM, found.keep_NM, found.same_token(target))
    torch.testing.assert_close(nll, -expected)


def test_joint_without_a_memory_is_the_language_model_and_has_clean_gradients():
    lm = torch.tensor([-1.0, -torch.inf], requires_grad=True)
    norm = torch.tensor([2.0, 3.0], requires_grad=True)
    scores = torch.randn(2, 4, requires_grad=True)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    out = scoring.joint_logp(lm, norm, scores, nothing, nothing)
    torch.testing.assert_close(out.detach(), lm.detach())
    out[0].backward()
    for leaf in (lm, norm, scores):
        assert torch.isfinite(leaf.grad).all()
    assert not scores.grad.any()


def test_joint_gradient_is_finite_where_neither_side_holds_the_target():
    lm = torch.full((1,), -torch.inf, requires_grad=True)
    scores = torch.zeros(1, 2, requires_grad=True)
    keep = torch.ones(1, 2, dtype=torch.bool)
    scoring.joint_logp(lm, torch.zeros(1), scores, keep, ~keep).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert torch.isfinite(lm.grad).all()


def test_joint_gradients_numerically():
    found = candidates(5, 3, 4)
    lm = torch.randn(3, dtype=torch.float64).requires_grad_()
    norm = torch.randn(3, dtype=torch.float64).requires_grad_()
    scores = found.scores_NM.clone().requires_grad_()
    same = found.same_token(torch.tensor([1, 2, 3]))
    assert torch.autograd.gradcheck(lambda a, b, s: scoring.joint_nll(a, b, s, found.keep_NM, same), (lm, norm, scores))


def test_interpolation_against_plain_probabilities():
    lm, memory = torch.tensor([0.2, 0.5, 0.1]).double(), torch.tensor([0.6, 0.0, 0.3]).double()
    out = scoring.interpolate(lm.log(), memory.log(), 0.25)
    torch.testing.assert_close(out.exp(), 0.75 * lm + 0.25 * memory)


def test_weight_zero_returns_the_language_model_bit_by_bit():
    lm = torch.randn(100)
    assert scoring.interpolate(lm, torch.full((100,), -torch.inf), 0.0) is lm
    memory = torch.randn(100)
    assert scoring.interpolate(lm, memory, 1.0) is memory


def test_interpolating_nothing_with_nothing_is_nothing():
    nothing = torch.tensor([-torch.inf])
    assert scoring.interpolate(nothing, nothing, 0.5).item() == -torch.inf


@pytest.mark.parametrize("weight", [1.3, -0.1, math.nan])
def test_weight_outside_the_unit_interval(weight):
    with pytest.raises(ValueError, match=r"is not in \[0, 1\]; 0 means the language model alone"):
        scoring.interpolate(torch.zeros(1), torch.zeros(1), weight)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    found = candidates(0, 1, 2)
    for call in (
        lambda: scoring.knn_logp(found, torch.tensor([0]), temperature),
        lambda: scoring.vocab_logp(found, V, temperature),
        lambda: scoring.log_sums(found, torch.tensor([0]), temperature),
    ):
        with pytest.raises(ValueError, match="is not positive"):
            call()


def plain_joint(lm: float, norm: float, hit: float, whole: float) -> float:
    """The target's share, from the parts as they are defined; the largest exponent is taken out first."""
    top = max(norm, whole)
    share = math.exp(lm + norm - top) + math.exp(hit - top)
    return math.log(share) - math.log(math.exp(norm - top) + math.exp(whole - top)) if share else -math.inf


@settings(max_examples=200, deadline=None)
@given(
    lm=st.floats(-20, 0) | st.just(-math.inf),
    norm=st.floats(-30, 60),
    whole=st.floats(-40, 80) | st.just(-math.inf),
    share=st.floats(-30, 0) | st.just(-math.inf),
)
def test_joint_logp_of_sums_against_the_shares(lm, norm, whole, share):
    parts = [torch.tensor([x], dtype=torch.float64) for x in (lm, norm, whole + share, whole)]
    ours = scoring.joint_logp_of_sums(parts[0], parts[1], LogSums(parts[2], parts[3])).item()
    assert ours == pytest.approx(plain_joint(lm, norm, whole + share, whole), rel=1e-9, abs=1e-9)
    lm_logp, lm_norm, hit, all_of_it = (x.float() for x in parts)
    ours = scoring.joint_logp_of_sums(lm_logp, lm_norm, LogSums(hit, all_of_it)).item()
    assert ours == pytest.approx(plain_joint(*(x.float().item() for x in parts)), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("norm", "whole", "expected"), [(-500.0, 500.0, -2.0), (500.0, -500.0, -1.0)])
def test_joint_logp_of_sums_where_one_side_has_all_the_weight(norm, whole, expected):
    parts = [torch.tensor([x]) for x in (-1.0, norm, whole - 2.0, whole)]
    ours = scoring.joint_logp_of_sums(parts[0], parts[1], LogSums(parts[2], parts[3]))
    assert ours.item() == pytest.approx(expected, abs=1e-4)


def test_joint_logp_of_sums_with_an_empty_memory_is_the_language_model_bit_for_bit():
    lm, norm = torch.randn(1000) * 5, torch.randn(1000) * 50
    nothing = torch.full((1000,), -torch.inf)
    assert torch.equal(scoring.joint_logp_of_sums(lm, norm, LogSums(nothing, nothing)), lm)


def test_gradient_of_empty_rows_is_finite_through_the_sums():
    """Rows: some with the target, none with it, none at all; each with and without the model's own share."""
    scores = torch.randn(6, 3, requires_grad=True)
    lm = torch.tensor([-1.0, -2.0, -3.0, -torch.inf, -torch.inf, -torch.inf], requires_grad=True)
    norm = torch.randn(6, requires_grad=True)
    keep = torch.tensor([[True] * 3, [True] * 3, [False] * 3] * 2)
    values = torch.tensor([[1, 2, 1], [2, 2, 3], [1, 1, 1]] * 2)
    sums = scoring.log_sums(Candidates(values, scores, keep), torch.ones(6, dtype=torch.int64), 1.25)
    assert torch.isneginf(sums.hit_N).tolist() == [False, True, True] * 2
    assert torch.isneginf(sums.whole_N).tolist() == [False, False, True] * 2
    logp = scoring.joint_logp_of_sums(lm, norm, sums)
    assert torch.isneginf(logp).tolist() == [False] * 4 + [True] * 2
    logp.sum().backward()
    for leaf in (scores, lm, norm):
        assert torch.isfinite(leaf.grad).all()
    assert not scores.grad[[2, 5]].any()
    assert lm.grad[2] == 1
    assert norm.grad[2] == 0


@any_candidates
def test_log_sums_are_sums_of_exp(seed, m, shared, temperature):
    found = candidates(seed, 4, m, shared)
    target = torch.randint(0, V, (4,), generator=torch.Generator().manual_seed(seed))
    sums, expected = scoring.log_sums(found, target, temperature), counted(found, temperature)
    torch.testing.assert_close(sums.hit_N, expected[torch.arange(4), target].log())
    torch.testing.assert_close(sums.whole_N, expected.sum(1).log())

"""Combiners: distributions over the vocabulary, plain probabilities counted by loops, and what they refuse."""

import itertools
import math

import pytest
import torch

from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.combiners.joint import JointNormalization
from fairseq.memory.scoring import interpolate, joint_logp, knn_logp, log_sums
from fairseq.memory.types import Candidates, LogSums

V = 11


def candidates(n: int = 5, m: int = 6) -> Candidates:
    rng = torch.Generator().manual_seed(0)
    keep = torch.rand(n, m, generator=rng) < 0.7
    keep[:, 0] = True
    return Candidates(torch.randint(0, V, (n, m), generator=rng), torch.randn(n, m, generator=rng), keep)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_sums_to_one_over_the_vocabulary(weight):
    found = candidates()
    lm = torch.randn(5, V).log_softmax(1)
    combine = Interpolation(weight, 2.0)
    columns = [combine(lm[:, v], torch.zeros(5), found, torch.full((5,), v)) for v in range(V)]
    torch.testing.assert_close(torch.stack(columns, 1).exp().sum(1), torch.ones(5))


def test_weight_zero_is_the_language_model_and_an_empty_memory_scales_it():
    found = candidates()
    lm, target = torch.randn(5), torch.arange(5)
    assert Interpolation(0.0)(lm, torch.zeros(5), found, target) is lm
    empty = Candidates(found.values_NM, found.scores_NM, torch.zeros_like(found.keep_NM))
    out = Interpolation(0.25)(lm, torch.zeros(5), empty, target)
    torch.testing.assert_close(out, lm + torch.log(torch.tensor(0.75)))


def test_impossible_settings():
    with pytest.raises(ValueError, match=r"^--lmbda 1.3 is not in \[0, 1\]; 0 means the language model alone$"):
        Interpolation(1.3)
    with pytest.raises(ValueError, match="temperature 0.0 is not positive"):
        Interpolation(0.5, 0.0)


DIM = 16
MODES = {"gn": {}, "li": {"with_external": False, "weight": 0.3}, "gnli": {"weight": 0.3}}


def language_model(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (5, V) and log-sums (5,)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(5, V, generator=rng).log_softmax(1), torch.randn(5, generator=rng) + 2


def text_memory(row_3_is_empty: bool = True) -> Candidates:
    """What memories of the text offer, already divided by the root of the width."""
    rng = torch.Generator().manual_seed(2)
    keep = torch.rand(5, 4, generator=rng) < 0.6
    keep[3] = not row_3_is_empty
    return Candidates(torch.randint(0, V, (1, 4), generator=rng), torch.randn(5, 4, generator=rng), keep)


def sums_of(found: Candidates | None, target: torch.Tensor, temperature: float) -> LogSums | None:
    return log_sums(found, target, temperature) if found is not None else None


def counted(combine: JointNormalization, found: Candidates | None, text: Candidates | None) -> torch.Tensor:
    """(5, V) probabilities from sums of exp, candidate by candidate, in plain Python numbers."""
    lm, norm = (x.double() for x in language_model())
    result = torch.zeros(5, V, dtype=torch.float64)
    for n in range(5):
        share = [math.exp(lm[n, v] + norm[n]) for v in range(V)]
        own = [0.0] * V
        joint_parts = [(text, combine.temperature)]
        if combine.with_external:
            joint_parts.append((found, combine.temperature * math.sqrt(DIM)))
        for part, temperature in joint_parts:
            for value, score in kept(part, n):
                share[value] += math.exp(score / temperature)
        for value, score in kept(found, n):
            own[value] += math.exp(score / combine.interpolation_temperature)
        whole = math.exp(norm[n]) + sum(share) - sum(math.exp(lm[n, v] + norm[n]) for v in range(V))
        weight = combine.weight if sum(own) else 0.0
        result[n] = torch.tensor([(1 - weight) * s / whole for s in share], dtype=torch.float64)
        if weight:
            result[n] += weight * torch.tensor(own, dtype=torch.float64) / sum(own)
    return result


def kept(found: Candidates | None, n: int) -> list[tuple[int, float]]:
    if found is None:
        return []
    values = found.values_NM.expand_as(found.scores_NM)[n]
    return [(int(v), float(s)) for v, s, keep in zip(values, found.scores_NM[n], found.keep_NM[n]) if keep]


def all_targets(combine: JointNormalization, found: Candidates | None, text: Candidates | None) -> torch.Tensor:
    lm, norm = language_model()
    targets = [torch.full((5,), v) for v in range(V)]
    near = [sums_of(text, target, combine.temperature) for target in targets]
    return torch.stack([combine(lm[:, v], norm, found, targets[v], near[v]) for v in range(V)], 1)


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("has_external", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_joint_normalisation_against_plain_probabilities(mode, has_external, has_text):
    combine = JointNormalization(DIM, temperature=1.25, interpolation_temperature=10.5, **MODES[mode])
    found = candidates() if has_external else None
    text = text_memory() if has_text else None
    ours = all_targets(combine, found, text).double().exp()
    torch.testing.assert_close(ours, counted(combine, found, text), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_external", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 0), slice(1, 4), slice(0, 5)])
def test_positions_for_which_the_index_found_nothing_still_sum_to_one(rows, with_external, weight):
    found = candidates()
    found.keep_NM[rows] = False
    combine = JointNormalization(DIM, with_external=with_external, weight=weight)
    ours = all_targets(combine, found, text_memory()).double().exp()
    torch.testing.assert_close(ours, counted(combine, found, text_memory()), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_the_formulas_put_together(mode):
    found, text, target = candidates(), text_memory(), torch.tensor([3, 0, 7, 2, 10])
    lm, norm = language_model()
    lm = lm.gather(1, target[:, None]).squeeze(1)
    combine = JointNormalization(DIM, temperature=1.25, interpolation_temperature=10.5, **MODES[mode])
    scores, keep, same = text.scores_NM / 1.25, text.keep_NM, text.same_token(target)
    if mode != "li":
        scores = torch.cat([scores, found.scores_NM / (1.25 * DIM**0.5)], 1)
        keep, same = torch.cat([keep, found.keep_NM], 1), torch.cat([same, found.same_token(target)], 1)
    expected = joint_logp(lm, norm, scores, keep, same)
    if mode != "gn":
        expected = interpolate(expected, knn_logp(found, target, 10.5), 0.3)
    ours = combine(lm, norm, found, target, log_sums(text, target, 1.25))
    torch.testing.assert_close(ours, expected)


def test_an_empty_memory_is_the_language_model_bit_for_bit():
    rng = torch.Generator().manual_seed(0)
    lm, norm = torch.randn(1000, generator=rng) * 5 - 9, torch.randn(1000, generator=rng) * 30
    target = torch.zeros(1000, dtype=torch.int64)
    values = torch.zeros(1000, 6, dtype=torch.int64)
    externals = (
        Candidates(values, torch.randn(1000, 6, generator=rng), values.bool()),
        Candidates(values - 1, torch.full((1000, 6), -torch.inf), values.bool()),  # ids of -1
        None,
    )
    for found, with_external, weight in itertools.product(externals, (True, False), (0.0, 0.25, 1.0)):
        combine = JointNormalization(DIM, with_external=with_external, weight=weight)
        nothing = torch.full((1000,), -torch.inf)
        for near in (None, LogSums(nothing, nothing)):
            assert torch.equal(combine(lm, norm, found, target, near), lm)


def test_without_a_share_the_external_distribution_changes_nothing():
    found, text, target = candidates(), text_memory(), torch.arange(5)
    lm, norm = language_model()
    near = log_sums(text, target, 1.0)
    without = JointNormalization(DIM, weight=0.0, with_external=False)(lm[:, 0], norm, found, target, near)
    assert torch.equal(without, JointNormalization(DIM)(lm[:, 0], norm, None, target, near))


def test_the_whole_share_is_the_external_distribution():
    found, target = candidates(), torch.arange(5)
    lm, norm = language_model()
    combine = JointNormalization(DIM, weight=1.0, interpolation_temperature=3.0)
    assert torch.equal(combine(lm[:, 0], norm, found, target), knn_logp(found, target, 3.0))


def test_interpolation_takes_no_memories_of_the_text():
    target = torch.arange(5)
    with pytest.raises(AssertionError, match="takes no memories of the text"):
        Interpolation(0.5)(torch.zeros(5), torch.zeros(5), candidates(), target, log_sums(text_memory(), target, 1.0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": -0.1}, r"--lmbda -0.1 is not in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature 0.0 is not positive"),
        ({"interpolation_temperature": -1.0}, "temperature -1.0 is not positive"),
    ],
)
def test_impossible_joint_settings(given, said):
    with pytest.raises(ValueError, match=said):
        JointNormalization(DIM, **given)

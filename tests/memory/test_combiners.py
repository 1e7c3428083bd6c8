"""Interpolation: a distribution over the vocabulary, and what it refuses."""

import pytest
import torch

from fairseq.memory.combiners.fixed import Interpolation
from fairseq.memory.types import Candidates

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

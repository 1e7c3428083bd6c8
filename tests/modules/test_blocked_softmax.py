"""The blocked softmax equals a product and a softmax in float64, values and gradients."""

import pytest
import torch

from fairseq.modules import blocked_softmax
from fairseq.modules.adaptive_softmax import pick

ROWS, WIDTH, TYPES = 700, 16, 3001  # blocks of 1,497 types, the last one of 7


def inputs():
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(ROWS, WIDTH), torch.randn(TYPES, WIDTH)
    target_N = torch.randint(0, TYPES, (ROWS,))
    target_N[:3] = torch.tensor([0, 1496, TYPES - 1])
    return hidden_ND, weight_VD, target_N


def values_and_gradients(compute, hidden_ND, weight_VD, grads, wants=(True, True)):
    """Both results, then the gradients that are wanted, for given gradients of the results."""
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip((hidden_ND, weight_VD), wants)]
    results = compute(*leaves)
    torch.autograd.backward(results, [g.to(r) for g, r in zip(grads, results)])
    return [r.detach() for r in results] + [leaf.grad for leaf in leaves if leaf.requires_grad]


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_values_and_gradients_equal_those_of_a_whole_softmax(wants):
    hidden_ND, weight_VD, target_N = inputs()
    assert blocked_softmax.fits(hidden_ND, weight_VD)
    grads = torch.randn(2, ROWS)
    found = values_and_gradients(
        lambda h, w: blocked_softmax.target_logp(h, w, target_N), hidden_ND, weight_VD, grads, wants
    )
    whole = lambda h, w: pick(h @ w.t(), target_N)  # noqa: E731
    expected = values_and_gradients(whole, hidden_ND.double(), weight_VD.double(), grads, wants)
    assert len(found) == len(expected)
    for own, other in zip(found, expected):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=3e-5)


def test_without_gradients_the_values_are_the_same():
    hidden_ND, weight_VD, target_N = inputs()
    with torch.no_grad():
        plain = blocked_softmax.target_logp(hidden_ND, weight_VD, target_N)
    kept = blocked_softmax.target_logp(hidden_ND, weight_VD.requires_grad_(), target_N)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept))


def test_a_certain_target_has_no_probability_above_one():
    weight_VD = torch.eye(TYPES, WIDTH) * 200
    hidden_ND = torch.eye(WIDTH).repeat(ROWS // WIDTH + 1, 1)[:ROWS]
    target_N = torch.arange(ROWS) % WIDTH
    logp_N, norm_N = blocked_softmax.target_logp(hidden_ND, weight_VD, target_N)
    assert logp_N.max() <= 0
    assert torch.equal(norm_N, torch.full((ROWS,), 200.0))


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden_ND, weight_VD, target_N = inputs()
    target_N[5] = TYPES
    with pytest.raises(IndexError, match="3001"):
        blocked_softmax.target_logp(hidden_ND, weight_VD, target_N)


def test_small_vocabularies_and_other_types_are_left_to_the_whole_softmax():
    hidden_ND, weight_VD, _ = inputs()
    assert not blocked_softmax.fits(hidden_ND[:10], weight_VD)  # one block would hold all types
    assert not blocked_softmax.fits(hidden_ND, weight_VD[:1000])
    assert not blocked_softmax.fits(hidden_ND.double(), weight_VD.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not blocked_softmax.fits(hidden_ND, weight_VD)

"""Adaptive softmax against PyTorch's own, against the dense distribution, and its gradient."""

import copy

import pytest
import torch

from fairseq.modules import blocked_softmax
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax, SharedHead

SIZE, WIDTH, CUTOFF = 23, 8, (6, 14)


def make(tied=False, tie_proj=False, **settings):
    torch.manual_seed(0)
    shared = AdaptiveInput(SIZE, 1, WIDTH, 2, WIDTH, CUTOFF) if tied else None
    made = AdaptiveSoftmax(SIZE, WIDTH, CUTOFF, factor=2, adaptive_input=shared, tie_proj=tie_proj, **settings)
    made.reset_parameters()
    return made.double()


def batch():
    torch.manual_seed(1)
    return torch.randn(40, WIDTH, dtype=torch.double), torch.randint(SIZE, (40,))


def test_agrees_with_pytorchs_adaptive_softmax():
    ours, (x, target) = make(), batch()
    oracle = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, SIZE, list(CUTOFF), div_value=2).double()
    weights = {"head.weight": ours.head.weight}
    for i, tail in enumerate(ours.tail):
        weights |= {f"tail.{i}.0.weight": tail[0].weight, f"tail.{i}.1.weight": tail[2].weight}
    oracle.load_state_dict(weights)
    logp, norm = ours.target_logp(x, target)
    torch.testing.assert_close(logp, oracle(x, target).output)
    torch.testing.assert_close(norm, (x @ ours.head.weight.t()).logsumexp(1))
    torch.testing.assert_close(ours.vocab_logp(x), oracle.log_prob(x))


@pytest.mark.parametrize(("tied", "tie_proj"), [(False, False), (True, False), (True, True)])
def test_target_is_one_entry_of_a_distribution(tied, tie_proj):
    softmax, (x, target) = make(tied, tie_proj), batch()
    dense = softmax.vocab_logp(x)
    torch.testing.assert_close(dense.logsumexp(1), torch.zeros(40, dtype=torch.double))
    torch.testing.assert_close(softmax.target_logp(x, target)[0], dense.gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("tie_proj", [False, True])
def test_tied_weights_are_the_inputs_own(tie_proj):
    torch.manual_seed(0)
    shared = AdaptiveInput(SIZE, 1, WIDTH, 2, WIDTH, CUTOFF)
    softmax = AdaptiveSoftmax(SIZE, WIDTH, CUTOFF, factor=2, adaptive_input=shared, tie_proj=tie_proj)
    assert isinstance(softmax.head, SharedHead)
    assert softmax.head.word_proj.weight is shared.embeddings[0][0].weight
    assert softmax.tail[1][2].weight is shared.embeddings[2][0].weight
    assert (softmax.tail[0][0].weight is shared.embeddings[1][1].weight) == tie_proj
    assert softmax.tail[0][0].weight.shape == ((WIDTH, 4) if tie_proj else (4, WIDTH))
    names = [name for name in softmax.state_dict() if not name.startswith("tail")]
    assert names == ["version", "head._float_tensor", "head.word_proj.weight", "head.class_proj.weight"]


def test_gradient():
    softmax, (x, target) = make(tied=True, tie_proj=True), batch()
    x, target = x[:6].requires_grad_(), torch.tensor([2, 7, 20, 13, 5, 22])
    weights = list(softmax.parameters())
    assert torch.autograd.gradcheck(lambda *_: softmax.target_logp(x, target), (x, *weights))


@pytest.mark.parametrize("targets", [[], [2, 3], [20]])
def test_tails_without_targets_get_a_zero_gradient(targets):
    softmax = make()
    x = torch.randn(len(targets), WIDTH, dtype=torch.double, requires_grad=True)
    logp, _ = softmax.target_logp(x, torch.tensor(targets, dtype=torch.long))
    logp.sum().backward()
    assert all(p.grad is not None for p in softmax.parameters())


def test_half_precision_is_normalised_in_single():
    softmax, (x, target) = make(), batch()
    exact, _ = softmax.target_logp(x, target)
    logp, norm = softmax.bfloat16().target_logp(x.bfloat16(), target)
    assert logp.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact, atol=0.1, rtol=0)


def test_dropout_acts_in_training_only():
    softmax, (x, target) = make(dropout=0.5), batch()
    softmax.train()
    assert not torch.equal(softmax.target_logp(x, target)[0], softmax.target_logp(x, target)[0])
    softmax.eval()
    assert torch.equal(softmax.target_logp(x, target)[0], softmax.target_logp(x, target)[0])


def test_one_cutoff_at_the_dictionarys_end_is_a_plain_softmax():
    softmax = AdaptiveSoftmax(SIZE, WIDTH, (SIZE,)).double()
    x, target = batch()
    expected = (x @ softmax.head.weight.t()).log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(softmax.target_logp(x, target)[0], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_wide_head_is_computed_by_blocks(tied, monkeypatch):
    # Float32, more types than fit in a block: values and gradients are those of the dense softmax in float64.
    size, cutoff, num_rows = 2600, (1500, 2500), 1100
    torch.manual_seed(2)
    shared = AdaptiveInput(size, 1, WIDTH, 2, WIDTH, cutoff) if tied else None
    ours = AdaptiveSoftmax(size, WIDTH, cutoff, factor=2, adaptive_input=shared)
    ours.reset_parameters()
    calls = []
    blocked = blocked_softmax.target_logp
    monkeypatch.setattr(blocked_softmax, "target_logp", lambda *given: (calls.append(given), blocked(*given))[1])
    x, target, weight = torch.randn(num_rows, WIDTH), torch.randint(size, (num_rows,)), torch.randn(num_rows)
    found = []
    for module in (ours, copy.deepcopy(ours).double()):
        given = x.to(module.tail[0][0].weight.dtype, copy=True).requires_grad_()
        if module is ours:
            logp, norm = module.target_logp(given, target)
        else:
            logp = module.vocab_logp(given).gather(1, target[:, None])[:, 0]
            norm = module.head(given).logsumexp(1)
        ((logp + 0.5 * norm) * weight.to(logp.dtype)).sum().backward()
        gradients = {name: parameter.grad.double() for name, parameter in module.named_parameters()}
        found.append({"logp": logp.double(), "norm": norm.double(), "x": given.grad.double(), **gradients})
    assert len(calls) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

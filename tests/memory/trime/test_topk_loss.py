"""The loss over a position's most similar memories, and with distances, against brute force in float64."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.utils.flop_counter import FlopCounterMode

from fairseq.memory.similarity import conjugate, lifted
from fairseq.memory.trime import streaming
from fairseq.memory.trime.joint_loss import InBatchMemory, joint_loss
from fairseq.memory.trime.visibility import ELSEWHERE, EXTERNAL, LOCAL, LONG
from fairseq.memory.types import Metric

RULES = [LOCAL, LONG, EXTERNAL, ELSEWHERE]


def draw(lengths, rule=ELSEWHERE, *, num_types=4, num_other=None, width=5, spread=1.0, seed=0, dtype=torch.float64):
    """Inputs of the loss (key, logp, norm, other) and the memory."""
    random = torch.Generator().manual_seed(seed)
    num = sum(lengths)

    def normal(*shape):
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * spread).to(dtype).requires_grad_()

    key, norm = normal(num, width), normal(num)
    logp = (-5 * torch.rand(num, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()
    token = torch.randint(num_types, (num,), generator=random)
    if num_other is None:
        return [key, logp, norm], InBatchMemory(token, lengths, rule, 1 / math.sqrt(width))
    other_token = torch.randint(num_types, (num_other,), generator=random)
    memory = InBatchMemory(token, lengths, rule, 1 / math.sqrt(width), other_token)
    return [key, logp, norm, normal(num_other, width)], memory


def brute_force(key, logp, norm, memory, other=None):
    """All similarities at once, minus infinity where a row does not see, cut to the largest of each row."""
    key, logp, norm = key.double(), logp.double(), norm.double()
    keys, tokens, keep = key, memory.token_N, memory.rule.mask(memory.lengths)
    if other is not None:
        keys, tokens = torch.cat([other.double(), key]), torch.cat([memory.other_token_M, memory.token_N])
        keep = torch.cat([keep.new_ones(len(key), len(other)), keep], dim=1)
    scores = key @ keys.T if memory.metric == Metric.IP else -(key[:, None] - keys).square().sum(2)
    scores = (scores * memory.scale).masked_fill(~keep, -torch.inf)
    if memory.topk is not None and memory.topk < len(keys):
        kept = scores.topk(memory.topk, dim=1)
        scores = torch.full_like(scores, -torch.inf).scatter(1, kept.indices, kept.values)
    vocabulary = (norm + logp)[:, None]
    positive = scores.masked_fill(tokens != memory.token_N[:, None], -torch.inf)
    above = torch.cat([vocabulary, positive], dim=1).logsumexp(1)
    return (torch.cat([norm[:, None], scores], dim=1).logsumexp(1) - above).sum()


def assert_brute_force(inputs, memory, rtol=1e-9, atol=1e-9):
    key, logp, norm, *other = inputs
    ours, theirs = joint_loss(key, logp, norm, memory, *other), brute_force(key, logp, norm, memory, *other)
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)
    for mine, true in zip(*(torch.autograd.grad(1.7 * loss, inputs) for loss in (ours, theirs))):
        torch.testing.assert_close(mine.double(), true.double(), rtol=rtol, atol=atol)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 9, 17]), min_size=1, max_size=6),
    rule=st.sampled_from([ELSEWHERE, *RULES]),
    num_other=st.sampled_from([None, None, 0, 1, 7]),
    num_types=st.sampled_from([1, 4, 50]),
    spread=st.sampled_from([1.0, 4.0]),
    metric=st.sampled_from([Metric.IP, Metric.L2]),
    topk=st.sampled_from([None, 1, 3, 8, 1000]),
    rows=st.sampled_from([1024, 7, 4]),
    seed=st.integers(0, 1000),
)
def test_any_batch_is_brute_force(lengths, rule, num_other, num_types, spread, metric, topk, rows, seed):
    inputs, memory = draw(lengths, rule, num_types=num_types, num_other=num_other, spread=spread, seed=seed)
    with mock.patch.object(streaming, "_SIZES", {"cpu": (rows, 1 << 26, 2)}):
        assert_brute_force(inputs, replace(memory, metric=metric, topk=topk), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("num_other", [None, 3])
@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
@pytest.mark.parametrize("topk", [None, 1, 3])
def test_gradcheck(topk, metric, num_other):
    inputs, memory = draw([3, 0, 5, 4], num_other=num_other)
    memory = replace(memory, metric=metric, topk=topk)
    key, logp, norm, *other = inputs
    assert torch.autograd.gradcheck(lambda *_: joint_loss(key, logp, norm, memory, *other), inputs)


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
@pytest.mark.parametrize("topk", [None, 8])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_narrow_keys_are_summed_in_float32(dtype, atol, topk, metric):
    inputs, memory = draw([40, 64, 30], width=32, num_types=20, dtype=torch.float32)
    inputs[0] = (inputs[0].detach() + 3.0).to(dtype).requires_grad_()  # distances do not see that all are far off
    key, logp, norm = inputs
    memory = replace(memory, metric=metric, topk=topk, scale=memory.scale / 10)
    ours, theirs = joint_loss(key, logp, norm, memory), brute_force(key, logp, norm, memory)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    mine, true = (torch.autograd.grad(loss, key)[0] for loss in (ours, theirs))
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), true.double(), rtol=2e-2, atol=atol)


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
@pytest.mark.parametrize("topk", [None, 3])
def test_one_sentence_is_exactly_the_translation_model(topk, metric):
    (key, logp, norm), memory = draw([6], dtype=torch.float32)
    loss = joint_loss(key, logp, norm, replace(memory, metric=metric, topk=topk))
    assert loss == (-logp).sum()
    grads = torch.autograd.grad(loss, [key, logp, norm])
    assert not grads[0].any()
    assert torch.equal(grads[1], -torch.ones_like(logp))
    assert not grads[2].any()


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_positions(lengths, metric):
    inputs, memory = draw(lengths, num_other=4)
    key, logp, norm, other = inputs
    loss = joint_loss(key, logp, norm, replace(memory, metric=metric, topk=2), other)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
@pytest.mark.parametrize("topk", [None, 2])
def test_nan_is_not_hidden(topk, metric):
    (key, logp, norm), memory = draw([6, 9, 4])
    key.data[7, 2] = torch.nan
    assert joint_loss(key, logp, norm, replace(memory, metric=metric, topk=topk)).isnan()


def test_without_gradients_nothing_is_kept():
    (key, logp, norm), memory = draw([6, 9, 4])
    memory = replace(memory, metric=Metric.L2, topk=2)
    expected = brute_force(key, logp, norm, memory).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = joint_loss(key, logp, norm, memory)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected)


def test_autocast_does_not_narrow_the_products():
    (key, logp, norm), memory = draw([9, 5], dtype=torch.float32)
    memory = replace(memory, metric=Metric.L2, topk=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = joint_loss(key, logp, norm, memory)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, joint_loss(key, logp, norm, memory))


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
def test_no_matrix_of_positions_and_memories_is_held(metric):
    num, rows = 1024, 32
    (key, logp, norm), memory = draw([num // 16] * 16, width=4, dtype=torch.float32)
    with mock.patch.object(streaming, "_SIZES", {"cpu": (rows, 1 << 26, 16)}), LargestTensor() as largest:
        joint_loss(key, logp, norm, replace(memory, metric=metric, topk=4)).backward()
    assert rows * 4 < largest.numel <= 2 * rows * num


def test_the_gradient_takes_no_product_of_all_keys_with_all_keys():
    num, width = 1024, 8
    (key, logp, norm), memory = draw([num // 16] * 16, width=width, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        joint_loss(key, logp, norm, replace(memory, topk=4)).backward()
    assert counter.get_total_flops() / (2 * num * num * width) <= 1


def test_products_of_lifted_rows_are_distances():
    random = torch.Generator().manual_seed(0)
    x, y = (5 + torch.randn(n, 6, generator=random, dtype=torch.float64) for n in (4, 3))
    center, radius = torch.full((6,), 4.0), torch.tensor(2.0)
    products = conjugate(lifted(x, center, radius), Metric.L2) @ lifted(y, center, radius).T
    torch.testing.assert_close(products, -torch.cdist(x, y).square())

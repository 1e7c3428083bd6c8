"""The streamed loss against the plain formula over a matrix of all scores, and what it may hold and compute."""

import contextlib
import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.utils.flop_counter import FlopCounterMode

from fairseq.memory.scoring import joint_nll
from fairseq.memory.trime import streaming, strip_gradients, symmetric
from fairseq.memory.trime.joint_loss import InBatchMemory, joint_loss
from fairseq.memory.trime.visibility import ELSEWHERE, EXTERNAL, LOCAL, LONG

RULES = {"local": LOCAL, "long": LONG, "external": EXTERNAL, "elsewhere": ELSEWHERE}
NOBODY = type(LOCAL)(own_past=False, earlier=False, later=False)


@pytest.fixture(autouse=True, scope="module")
def _unset_memory_is_nan():
    """PyTorch fills memory nobody has written to with NaN, so that using any of it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def sizes(rows, causal, chunk=1 << 18, pairs=1 << 20):
    """Other sizes of blocks, so that small batches meet every kind of edge."""
    with (
        mock.patch.object(streaming, "_SIZES", {"cpu": (rows, 1 << 26, causal)}),
        mock.patch.object(strip_gradients, "CHUNK", chunk),
        mock.patch.object(symmetric, "CHUNK", chunk),
        mock.patch.object(strip_gradients, "_MAX_PAIRS", pairs),
    ):
        yield


@dataclass
class Case:
    """A batch, and how to compute its loss in two ways."""

    key: torch.Tensor
    logp: torch.Tensor
    norm: torch.Tensor
    memory: InBatchMemory
    other: torch.Tensor | None

    @classmethod
    def draw(cls, lengths, rule, *, num_types=4, num_other=None, width=5, spread=1.0, seed=0, dtype=torch.float64):
        draw = torch.Generator().manual_seed(seed)
        num = sum(lengths)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        other = None if num_other is None else (normal(num_other, width) * spread).requires_grad_()
        memory = InBatchMemory(
            torch.randint(num_types, (num,), generator=draw),
            lengths,
            rule,
            1 / math.sqrt(width),
            None if num_other is None else torch.randint(num_types, (num_other,), generator=draw),
        )
        key = (normal(num, width) * spread).requires_grad_()
        logp = (-5 * torch.rand(num, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
        return cls(key, logp, normal(num).requires_grad_(), memory, other)

    @property
    def inputs(self):
        return [x for x in (self.key, self.logp, self.norm, self.other) if x is not None]

    def streamed(self):
        return joint_loss(self.key, self.logp, self.norm, self.memory, self.other)

    def plain(self):
        """The published formula over matrices of everything, in float64."""
        key, logp, norm = self.key.double(), self.logp.double(), self.norm.double()
        keys, tokens, keep = key, self.memory.token_N, self.memory.rule.mask(self.memory.lengths)
        if self.other is not None:
            keys = torch.cat([keys, self.other.double()])
            tokens = torch.cat([tokens, self.memory.other_token_M])
            keep = torch.cat([keep, keep.new_ones(len(key), len(self.other))], dim=1)
        scores = key @ keys.T * self.memory.scale
        return joint_nll(logp, norm, scores, keep, self.memory.token_N[:, None] == tokens).sum()


def assert_formula(case, rtol=1e-9, atol=1e-9):
    """Loss, and its gradients from a further factor."""
    ours, theirs = case.streamed(), case.plain()
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)
    for mine, true in zip(*(torch.autograd.grad(1.7 * loss, case.inputs) for loss in (ours, theirs))):
        torch.testing.assert_close(mine, true, rtol=rtol, atol=atol)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 9, 17]), max_size=6),
    rule=st.sampled_from([*RULES.values(), NOBODY]),
    num_other=st.sampled_from([None, None, 0, 1, 7]),
    num_types=st.sampled_from([1, 2, 4, 50]),
    spread=st.sampled_from([1.0, 1.0, 4.0, 30.0]),
    blocks=st.sampled_from([(512, 256, 1 << 18, 1 << 20), (4, 2, 16, 3), (7, 3, 5, 20), (5, 8, 1, 1), (30, 4, 40, 9)]),
    seed=st.integers(0, 1000),
)
def test_any_batch_gives_the_formulas_loss_and_gradients(lengths, rule, num_other, num_types, spread, blocks, seed):
    case = Case.draw(lengths, rule, num_types=num_types, num_other=num_other, spread=spread, seed=seed)
    with sizes(*blocks):
        assert_formula(case, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_other", [None, 3])
@pytest.mark.parametrize("name", sorted(RULES))
def test_gradcheck(name, num_other):
    case = Case.draw([3, 0, 5, 4], RULES[name], num_other=num_other)
    with sizes(4, 2, 8):
        assert torch.autograd.gradcheck(lambda *_: case.streamed(), case.inputs)


@pytest.mark.parametrize("name", sorted(RULES))
def test_float32_is_as_exact_as_float32_can_be(name):
    case = Case.draw([40, 64, 30], RULES[name], width=32, num_types=20, dtype=torch.float32)
    assert_formula(case, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(RULES))
def test_half_precision_keys_are_summed_in_float32(name, dtype):
    case = Case.draw([40, 64, 30], RULES[name], width=32, num_types=20, dtype=torch.float32)
    case.key = case.key.detach().to(dtype).requires_grad_()
    ours, theirs = case.streamed(), case.plain()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    mine, true = (torch.autograd.grad(loss, case.key)[0] for loss in (ours, theirs))
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, true, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", sorted(RULES))
def test_autocast_does_not_narrow_the_products(name):
    case = Case.draw([9, 5], RULES[name], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.streamed()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, case.streamed())


EXTREMES = {
    "vocabulary next to nothing": lambda case: case.logp.data.fill_(-500.0),
    "log-sums far apart": lambda case: case.norm.data.copy_(torch.linspace(-300, 300, len(case.norm))),
    "memory certain": lambda case: case.key.data.mul_(100.0),
    "memory next to nothing": lambda case: case.norm.data.add_(300.0),
    "one loud key": lambda case: case.key.data[7].mul_(1000.0),
}


@pytest.mark.parametrize("extreme", sorted(EXTREMES))
@pytest.mark.parametrize("name", sorted(RULES))
def test_no_range_of_scores_is_lost(name, extreme):
    case = Case.draw([6, 9, 4], RULES[name])
    EXTREMES[extreme](case)
    assert_formula(case, rtol=1e-7, atol=1e-9)
    narrow = Case.draw([6, 9, 4], RULES[name], dtype=torch.float32)
    EXTREMES[extreme](narrow)
    torch.testing.assert_close(narrow.streamed().double(), narrow.plain(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lengths", "rule", "num_other"),
    [([1, 1, 1], LOCAL, None), ([4], ELSEWHERE, None), ([4], ELSEWHERE, 0), ([5, 3], NOBODY, None), ([1], LONG, 0)],
)
def test_an_empty_memory_is_exactly_the_language_model(lengths, rule, num_other, dtype):
    case = Case.draw(lengths, rule, num_other=num_other, dtype=dtype)
    loss = case.streamed()
    assert loss == (-case.logp).sum()
    key, logp, norm = torch.autograd.grad(loss, [case.key, case.logp, case.norm])
    assert not key.any()
    assert torch.equal(logp, -torch.ones_like(logp))
    assert not norm.any()


@pytest.mark.parametrize("num_other", [None, 4])
@pytest.mark.parametrize("name", sorted(RULES))
def test_no_positions(name, num_other):
    case = Case.draw([0, 0], RULES[name], num_other=num_other)
    loss = case.streamed()
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, case.inputs))


@pytest.mark.parametrize("name", sorted(RULES))
def test_nan_is_not_hidden(name):
    case = Case.draw([6, 9, 4], RULES[name])
    case.key.data[7, 2] = torch.nan
    assert case.streamed().isnan()


def test_only_what_is_asked_for_is_differentiated():
    case = Case.draw([6, 9], LONG, num_other=3)
    whole = torch.autograd.grad(case.streamed(), case.inputs)
    for number, wanted in enumerate(case.inputs):
        for x in case.inputs:
            x.requires_grad_(x is wanted)
        (alone,) = torch.autograd.grad(case.streamed(), wanted)
        torch.testing.assert_close(alone, whole[number], rtol=1e-12, atol=1e-12)


def test_without_gradients_nothing_is_kept():
    case = Case.draw([6, 9], EXTERNAL)
    expected = case.plain().detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = case.streamed()
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected)


def test_going_backward_twice_gives_the_same_twice():
    case = Case.draw([6, 9], LONG)
    loss = case.streamed()
    first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for x, grad in zip(case.inputs, first):
        torch.testing.assert_close(x.grad, 3 * grad)


@pytest.mark.parametrize("num_types", [1, 1000])
@pytest.mark.parametrize("name", sorted(RULES))
def test_no_matrix_of_tokens_and_memories_is_held(name, num_types):
    num, rows = 1024, 32
    case = Case.draw([num // 16] * 16, RULES[name], num_types=num_types, width=4, dtype=torch.float32)
    with sizes(rows, 16, 1 << 12, 1 << 10), LargestTensor() as largest:
        case.streamed().backward()
    assert rows * 4 < largest.numel <= 2 * rows * num


@pytest.mark.parametrize(
    ("name", "products"),
    [("local", 3 / 16), ("long", 3 / 2), ("external", 4 / 2 * 15 / 16 + 3 / 16), ("elsewhere", 4 / 2 * 15 / 16)],
)
def test_no_more_is_multiplied_than_the_rule_needs(name, products):
    # In units of one product of all keys with all keys. The plain formula takes three.
    num, width = 2048, 8
    case = Case.draw([num // 16] * 16, RULES[name], width=width, dtype=torch.float32)
    with sizes(256, 32), FlopCounterMode(display=False) as counter:
        case.streamed().backward()
    assert counter.get_total_flops() / (2 * num * num * width) <= products * 1.15


def test_positions_and_lengths_must_agree():
    case = Case.draw([6, 9], LONG)
    case.memory = InBatchMemory(case.memory.token_N, [6, 8], LONG, 1.0)
    with pytest.raises(AssertionError):
        case.streamed()

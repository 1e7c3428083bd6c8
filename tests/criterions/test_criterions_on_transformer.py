"""Training losses on the project's own language model."""

import pytest
import torch
from small_models import ADAPTIVE, PAD, PLAIN, VOCAB, make_batch, make_model
from torch import nn

from fairseq.criterions.base import build_criterion
from fairseq.data.types import LMBatch

CASES = {
    "adaptive_loss": (ADAPTIVE, {}),
    "cross_entropy": (PLAIN, {}),
    "label_smoothed_cross_entropy": ({}, {"label_smoothing": 0.1}),
}


def make(name):
    model_given, criterion_given = CASES[name]
    model = make_model(**model_given).float()
    return model, build_criterion(name, criterion_given, model)


def loss_and_gradients(name, batches):
    model, criterion = make(name)
    total = sum(criterion(model, batch).sum for batch in batches)
    total.backward()
    return total.detach(), [p.grad for p in model.parameters()]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_loss_and_gradient_are_those_of_the_full_distribution(name):
    batch = make_batch()
    model, _ = make(name)
    logp_BTV = model.vocab_logp(model(batch.tokens_BT).hidden_BTD.flatten(0, 1)).view(3, 7, VOCAB)
    # PyTorch gives e / V to all V types, the target included. Ours leaves the target 1 - e, the others e / (V - 1).
    smoothing = CASES[name][1].get("label_smoothing", 0.0) * VOCAB / (VOCAB - 1)
    total = nn.functional.cross_entropy(
        logp_BTV.transpose(1, 2), batch.target_BT, ignore_index=PAD, reduction="sum", label_smoothing=smoothing
    )
    total.backward()
    assert_same(loss_and_gradients(name, [batch]), (total.detach(), [p.grad for p in model.parameters()]))


@pytest.mark.parametrize("name", sorted(CASES))
def test_shards_add_up_to_the_whole_and_padding_changes_nothing(name):
    batch = make_batch()
    whole = loss_and_gradients(name, [batch])
    rows = [LMBatch(*(part[row : row + 1] for part in batch.parts()[:4])) for row in range(3)]
    assert_same(loss_and_gradients(name, rows), whole)
    assert_same(loss_and_gradients(name, [make_batch(width=12)]), whole)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_rank_without_work_gives_every_weight_a_gradient_of_zero(name):
    total, gradients = loss_and_gradients(name, [LMBatch.empty()])
    assert total == 0
    assert all(grad is not None and not grad.any() for grad in gradients)

"""Training losses against PyTorch's own formulas, on any cut of the data."""

from types import SimpleNamespace

import pytest
import small_models
import torch
from torch import nn

from fairseq.criterions import CRITERIONS
from fairseq.criterions.base import build_criterion, scored
from fairseq.data.types import LMBatch

VOCAB, WIDTH = 12, 8
GIVEN = {"label_smoothed_cross_entropy": {"label_smoothing": 0.1}}


class PlainModel(nn.Module):
    """Running sums of embeddings (so the past counts) under a softmax."""

    has_adaptive_softmax = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, tokens_BT):
        return SimpleNamespace(hidden_BTD=self.embed(tokens_BT).cumsum(1), key_BTD=None)

    def vocab_logp(self, hidden_ND):
        return self.out(hidden_ND).log_softmax(-1)

    def target_logp(self, hidden_ND, target_N, chunk=None):
        logits_NV = self.out(hidden_ND)
        norm_N = logits_NV.logsumexp(-1)
        return logits_NV.gather(1, target_N[:, None])[:, 0] - norm_N, norm_N


class AdaptiveModel(PlainModel):
    """The same under PyTorch's adaptive softmax, whose full distribution is the oracle."""

    has_adaptive_softmax = True

    def __init__(self):
        super().__init__()
        self.out = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, VOCAB, [4, 8], div_value=2.0).double()

    def vocab_logp(self, hidden_ND):
        return self.out.log_prob(hidden_ND)

    def target_logp(self, hidden_ND, target_N, chunk=None):
        return self.out(hidden_ND, target_N).output, None


MODELS = {
    "adaptive_loss": AdaptiveModel,
    "cross_entropy": PlainModel,
    "label_smoothed_cross_entropy": PlainModel,
}


def make_batch(lengths=(5, 3, 4), **more):
    return small_models.make_batch(lengths, seed=3, vocab=VOCAB, **more)


def row_of(batch, row):
    parts = (batch.ids_B, batch.tokens_BT, batch.target_BT, batch.scored_BT)
    return LMBatch(*(part[row : row + 1] for part in parts))


def gradients_of(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def loss_and_gradients(name, batches, **given):
    model = MODELS[name]()
    criterion = build_criterion(name, GIVEN.get(name, {}) | given, model)
    losses = [criterion(model, batch) for batch in batches]
    sum(loss.sum for loss in losses).backward()
    return losses, gradients_of(model)


def assert_same(ours, theirs):
    assert sum(x.sum for x in ours[0]).item() == pytest.approx(sum(x.sum for x in theirs[0]).item(), rel=1e-12)
    for left, right in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def reference(name, batch, smoothing):
    """PyTorch's cross-entropy over the full distribution, unscored positions ignored by its own means."""
    model = MODELS[name]()
    logp_BTV = model.vocab_logp(model(batch.tokens_BT).hidden_BTD.flatten(0, 1)).view(*batch.tokens_BT.shape, VOCAB)
    target_BT = batch.target_BT.masked_fill(~batch.scored_BT, -100)
    # PyTorch gives e / V to all V types, the target included. Ours leaves the target 1 - e, the others e / (V - 1).
    theirs = smoothing * VOCAB / (VOCAB - 1)
    total = nn.functional.cross_entropy(logp_BTV.transpose(1, 2), target_BT, reduction="sum", label_smoothing=theirs)
    total.backward()
    return [SimpleNamespace(sum=total)], gradients_of(model)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_loss_and_gradient_are_those_of_pytorch(name, context):
    batch = make_batch(context=context)
    smoothing = GIVEN.get(name, {}).get("label_smoothing", 0.0)
    assert_same(loss_and_gradients(name, [batch]), reference(name, batch, smoothing))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shards_add_up_to_the_whole(name):
    batch = make_batch()
    whole, parts = (loss_and_gradients(name, batches) for batches in ([batch], [row_of(batch, i) for i in range(3)]))
    assert_same(parts, whole)
    for figure in whole[0][0].log:
        assert sum(float(part.log[figure]) for part in parts[0]) == pytest.approx(float(whole[0][0].log[figure]))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_padding_changes_nothing(name):
    assert_same(loss_and_gradients(name, [make_batch(width=9)]), loss_and_gradients(name, [make_batch()]))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_counts(name):
    (loss,), _ = loss_and_gradients(name, [make_batch(context=1)])
    assert loss.sample_size == 4 + 2 + 3
    assert (loss.log["sample_size"], loss.log["ntokens"], loss.log["nsentences"]) == (9, 9, 3)
    assert loss.log["loss"] == loss.sum
    assert not loss.log["loss"].requires_grad
    (by_sentence,), _ = loss_and_gradients(name, [make_batch(context=1)], sentence_avg=True)
    assert (by_sentence.sample_size, by_sentence.log["ntokens"]) == (3, 9)


@pytest.mark.parametrize("batch", [LMBatch.empty(), make_batch((2, 1), context=2)], ids=["no rows", "context only"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_batch_without_a_scored_position_takes_part_with_nothing(name, batch):
    # A rank without work must still go through backward, or the other ranks wait for it.
    (loss,), gradients = loss_and_gradients(name, [batch])
    assert (loss.sum.item(), loss.sample_size) == (0, 0)
    assert not any(grad.any() for grad in gradients)


def test_smoothing_of_zero_is_plain_cross_entropy():
    smoothed = loss_and_gradients("label_smoothed_cross_entropy", [make_batch()], label_smoothing=0.0)
    assert_same(smoothed, loss_and_gradients("cross_entropy", [make_batch()]))


def test_smoothing_reports_the_likelihood_as_well():
    (smoothed,), _ = loss_and_gradients("label_smoothed_cross_entropy", [make_batch()])
    (plain,), _ = loss_and_gradients("cross_entropy", [make_batch()])
    assert float(smoothed.log["nll_loss"]) == pytest.approx(plain.sum.item())
    assert smoothed.log["loss"] > smoothed.log["nll_loss"]


def test_hidden_states_are_not_copied_when_every_position_counts():
    batch = make_batch((4, 4))
    out = SimpleNamespace(hidden_BTD=torch.randn(2, 4, WIDTH))
    hidden_ND, target_N = scored(out, batch)
    assert hidden_ND.data_ptr() == out.hidden_BTD.data_ptr()
    assert torch.equal(target_N, batch.target_BT[batch.scored_BT])


def test_half_precision_losses_are_summed_in_float32():
    model = PlainModel().bfloat16()
    loss = build_criterion("cross_entropy", {}, model)(model, make_batch((40,) * 50))
    assert loss.sum.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "model", "given", "said"),
    [
        ("cross_entropy", AdaptiveModel, {}, "use --criterion adaptive_loss"),
        ("label_smoothed_cross_entropy", AdaptiveModel, {}, "use --criterion adaptive_loss"),
        ("adaptive_loss", PlainModel, {}, "give --adaptive-softmax-cutoff"),
        ("cross_entropie", PlainModel, {}, "did you mean 'cross_entropy'"),
        (
            "label_smoothed_cross_entropy",
            PlainModel,
            {"label_smoothing": 1.0},
            r"--label-smoothing must lie in \[0, 1\)",
        ),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(name, model, given, said):
    with pytest.raises(ValueError, match=said):
        build_criterion(name, given, model())


def test_every_criterion_is_tested_here():
    assert set(MODELS) <= set(CRITERIONS)
    assert all(entry.load() for entry in CRITERIONS.values())

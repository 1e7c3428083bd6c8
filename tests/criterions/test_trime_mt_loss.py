"""TRIME's loss for translation: the plain formula on a small model, figures of the original, settings."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import PLAIN, make_batch, make_model
from small_translation import make_pairs, make_translation_model
from torch import nn

from fairseq.criterions.base import build_criterion
from fairseq.data.types import LMBatch, TranslationBatch

SETTINGS = [
    {},
    {"temp": 10.0, "topk_mem": 8},
    {"topk_mem": 1},
    {"dist_func": "l2", "temp": 0.5},
    {"dist_func": "l2", "topk_mem": 3},
    {"topk_mem": 1000},
]


def formula(model, batch, *, dist_func="ip", temp=1.0, topk_mem=None):
    """The loss in loops over pairs of positions, as the paper writes it."""
    out = model(batch.tokens_BT, **batch.source)
    x_ND, y_N = out.hidden_BTD[batch.scored_BT], batch.target_BT[batch.scored_BT].tolist()
    logits_NV = model.vocab_scores(x_ND).double()
    sentence_N = batch.scored_BT.nonzero()[:, 0].tolist()
    total = logits_NV.new_zeros(())
    for i, x_D in enumerate(x_ND):
        others = [j for j in range(len(x_ND)) if sentence_N[j] != sentence_N[i]]
        pairs = [x_D @ x_ND[j] if dist_func == "ip" else -(x_D - x_ND[j]).square().sum() for j in others]
        scored = [(s / math.sqrt(len(x_D)) / temp, j) for s, j in zip(pairs, others)]
        kept = sorted(scored, key=lambda pair: -pair[0].item())[:topk_mem]
        above = [logits_NV[i, y_N[i]], *(s for s, j in kept if y_N[j] == y_N[i])]
        below = [*logits_NV[i], *(s for s, _ in kept)]
        total = total + torch.stack(below).logsumexp(0) - torch.stack(above).logsumexp(0)
    return total


def gradients(model, total):
    model.zero_grad(set_to_none=True)
    total.backward()
    return [p.grad for p in model.parameters()]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_loss_and_gradients_are_those_of_the_formula(given):
    for batch in (make_pairs(vocab=8), make_pairs((5, 5)), make_pairs((7, 1, 6), width=9, vocab=5)):
        model = make_translation_model()
        loss = build_criterion("trime_mt_loss", given, model)(model, batch)
        expected = formula(model, batch, **given)
        assert_same(loss.sum.double(), expected)
        assert_same(gradients(model, loss.sum), gradients(model, expected))
        assert loss.sample_size == batch.num_scored


def test_a_target_that_no_memory_holds_has_a_finite_loss():
    model, batch = make_translation_model(), make_pairs((3, 3))
    batch.target_BT[:] = torch.arange(4, 10).view(2, 3)
    loss = build_criterion("trime_mt_loss", {"topk_mem": 2}, model)(model, batch)
    assert_same(loss.sum.double(), formula(model, batch, topk_mem=2))
    assert loss.sum > build_criterion("cross_entropy", {}, model)(model, batch).sum
    assert all(grad.isfinite().all() for grad in gradients(model, loss.sum))


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_one_sentence_is_cross_entropy(given):
    model, batch = make_translation_model(), make_pairs((6,))
    ours, plain = (
        build_criterion(n, g, model)(model, batch) for n, g in (("trime_mt_loss", given), ("cross_entropy", {}))
    )
    assert ours.sum.item() == plain.sum.item()
    assert ours.log["ori_loss"] == plain.log["loss"]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_pads_are_no_memories_and_get_no_gradient(given):
    model = make_translation_model()
    criterion = build_criterion("trime_mt_loss", given, model)
    tight, wide = (criterion(model, make_pairs(width=width)).sum for width in (7, 12))
    assert_same(tight, wide)
    assert_same(gradients(model, tight), gradients(model, wide))


@pytest.mark.parametrize("batch", [TranslationBatch.empty(), make_pairs(())], ids=["empty", "no rows"])
def test_a_rank_without_work_gives_every_weight_a_gradient_of_zero(batch):
    model = make_translation_model()
    loss = build_criterion("trime_mt_loss", {"topk_mem": 2}, model)(model, batch)
    assert (loss.sum.item(), loss.sample_size) == (0, 0)
    assert not any(grad.any() for grad in gradients(model, loss.sum))


def test_the_own_sentence_is_hidden_whole():
    # With random states a position is by far the most similar one to itself: it would win every place of the memory.
    model, batch = make_translation_model(), make_pairs((4, 4))
    batch.target_BT[0], batch.target_BT[1] = 5, 6
    loss = build_criterion("trime_mt_loss", {"topk_mem": 2}, model)(model, batch)
    assert loss.log["norm_loss"] > loss.log["ori_loss"]


def test_the_key_is_the_input_of_the_output_layer_unless_asked_otherwise():
    batch = make_pairs()
    default, asked, other = (
        build_criterion("trime_mt_loss", {}, model)(model, batch).sum.item()
        for model in (
            make_translation_model(),
            make_translation_model(knn_keytype="model_output"),
            make_translation_model(knn_keytype="last_ffn_input"),
        )
    )
    assert default == asked != other


def test_warm_up_epochs_train_by_cross_entropy_and_validate_with_memory():
    model, batch = make_translation_model(), make_pairs()
    criterion = build_criterion("trime_mt_loss", {"ce_warmup_epoch": 2, "topk_mem": 3}, model)
    plain = build_criterion("cross_entropy", {}, model)(model, batch).sum
    joint = formula(model, batch, topk_mem=3)
    for epoch, expected in ((1, plain), (2, plain), (3, joint)):
        criterion.start_epoch(epoch)
        for _ in range(2):  # in the original the first step ended the warm-up
            assert_same(criterion(model.train(), batch).sum.double(), expected.double())
        assert_same(criterion(model.eval(), batch).sum.double(), joint)


def test_a_language_model_trains_with_it_too():
    model, batch = make_model(**PLAIN), make_batch()
    loss = build_criterion("trime_mt_loss", {"topk_mem": 2}, model)(model, batch)
    assert_same(loss.sum.double(), formula(model, batch, topk_mem=2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temp": 0.0}, "--temp 0.0 is not positive"),
        ({"temp": math.inf}, "--temp inf is not positive"),
        ({"topk_mem": 0}, "--topk-mem must be at least 1, got 0"),
        ({"dist_func": "cos"}, "--dist-func 'cos' is neither ip nor l2"),
        ({"ce_warmup_epoch": -1}, "--ce-warmup-epoch must not be negative, got -1"),
        ({"label_smoothing": 0.1}, "--label-smoothing must be 0 .* got 0.1: .*; give 0, or use .*label_smoothed_cross"),
    ],
)
def test_settings_out_of_range_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        build_criterion("trime_mt_loss", given, make_translation_model())


class Stored(nn.Module):
    """The original's states and output layer, in the place of a model."""

    has_adaptive_softmax = False

    def __init__(self, arrays):
        super().__init__()
        self.state_BTD = nn.Parameter(torch.tensor(arrays["knn_embed"]))
        self.weight_VD = nn.Parameter(torch.tensor(arrays["W"]))

    def key_dim(self, tap):
        return self.state_BTD.shape[2]

    def forward(self, tokens_BT, key_tap=None):
        assert key_tap == "model_output"
        return SimpleNamespace(hidden_BTD=self.state_BTD, key_BTD=self.state_BTD)

    def target_logp(self, hidden_ND, target_N):
        logits_NV = hidden_ND @ self.weight_VD.T
        score_N = logits_NV.gather(1, target_N[:, None])[:, 0]
        norm_N = logits_NV.logsumexp(1)
        return score_N - norm_N, norm_N


def test_the_originals_loss_and_gradients():
    if "FAIRSEQ_GOLDEN" not in os.environ:
        pytest.skip("FAIRSEQ_GOLDEN names no folder of figures")
    np = pytest.importorskip("numpy")
    folder = Path(os.environ["FAIRSEQ_GOLDEN"]) / "mt" / "crit"
    arrays, expected = np.load(folder / "batch.npz"), np.load(folder / "crit_ip_top8_t10_float32.npz")
    model, target = Stored(arrays), torch.tensor(arrays["target"])
    batch = LMBatch(torch.tensor(arrays["ids"]), torch.tensor(arrays["prev_output_tokens"]), target, target.ne(1))
    loss = build_criterion("trime_mt_loss", {"temp": 10.0, "topk_mem": 8}, model)(model, batch)
    assert loss.sum.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert loss.log["ori_loss"].item() == pytest.approx(expected["ce_loss"].item(), rel=1e-5)
    loss.sum.backward()
    for ours, name in ((model.state_BTD.grad, "grad_knn_embed"), (model.weight_VD.grad, "grad_W")):
        theirs = torch.tensor(expected[name])
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

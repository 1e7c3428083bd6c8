"""TRIME's losses on language models: the plain formula, figures of the original, one process against two."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import ADAPTIVE, PAD, PLAIN, make_batch, make_model
from torch import nn

from fairseq.criterions.base import build_criterion
from fairseq.data.types import LMBatch
from fairseq.memory.scoring import joint_nll
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

NAMES = ["trime_ext_loss", "trime_long_loss", "trime_long_loss_same_device", "trime_loss"]


def sees(name, batch, cross=False):
    """Loops over the scored positions, row after row."""
    places = batch.scored_BT.nonzero().tolist()
    rules = {
        "trime_loss": lambda a, b: a[0] == b[0] and b[1] < a[1],
        "trime_long_loss": lambda a, b: b < a,
        "trime_long_loss_same_device": lambda a, b: b < a,
        "trime_ext_loss": lambda a, b: a[0] != b[0] or (b[1] < a[1] and not cross),
    }
    return torch.tensor([[rules[name](a, b) for b in places] for a in places])


def formula(name, model, batch, tap="last_ffn_input", cross=False):
    out = model(batch.tokens_BT, key_tap=tap)
    hidden_ND, key_ND = out.hidden_BTD[batch.scored_BT], out.key_BTD[batch.scored_BT]
    target_N = batch.target_BT[batch.scored_BT]
    logp_N, norm_N = model.target_logp(hidden_ND, target_N)
    scores_NN = key_ND @ key_ND.T / math.sqrt(key_ND.shape[1])
    same_NN = target_N[:, None] == target_N
    return joint_nll(logp_N.double(), norm_N.double(), scores_NN, sees(name, batch, cross), same_NN).sum()


def gradients(model, total):
    model.zero_grad(set_to_none=True)
    total.backward()
    return [p.grad for p in model.parameters()]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [PLAIN, ADAPTIVE], ids=["plain", "adaptive"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_formula(name, given):
    for batch in (make_batch(), make_batch((5, 5)), make_batch((7, 1, 6), context=2, width=9)):
        model = make_model(**given)
        loss = build_criterion(name, {}, model)(model, batch)
        expected = formula(name, model, batch)
        assert_same(loss.sum, expected)
        assert_same(gradients(model, loss.sum), gradients(model, expected))
        assert loss.sample_size == batch.num_scored


@pytest.mark.parametrize("name", NAMES)
def test_pads_are_no_memories_and_get_no_gradient(name):
    model = make_model(**ADAPTIVE)
    criterion = build_criterion(name, {}, model)
    tight, wide = (criterion(model, make_batch(width=width)).sum for width in (7, 12))
    assert_same(tight, wide)
    assert_same(gradients(model, tight), gradients(model, wide))


@pytest.mark.parametrize("tap", ["last_ffn_input", "model_output", "separated_head"])
def test_the_key_is_the_state_asked_for(tap):
    model = make_model(**PLAIN, knn_keytype=tap)
    assert_same(
        build_criterion("trime_loss", {}, model)(model, make_batch()).sum,
        formula("trime_loss", model, make_batch(), tap),
    )


@pytest.mark.parametrize("batch", [LMBatch.empty(), make_batch((2, 1), context=2)], ids=["no rows", "context only"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_without_work_gives_every_weight_a_gradient_of_zero(name, batch):
    model = make_model(**ADAPTIVE)
    loss = build_criterion(name, {}, model)(model, batch)
    assert (loss.sum.item(), loss.sample_size) == (0, 0)
    assert all(grad is not None and not grad.any() for grad in gradients(model, loss.sum))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_memory_is_the_plain_language_model(name):
    model = make_model(**ADAPTIVE)
    batch = make_batch((1,))
    ours, plain = (build_criterion(n, {}, model)(model, batch) for n in (name, "adaptive_loss"))
    assert ours.sum.item() == plain.sum.item()
    assert ours.log["ori_loss"] == plain.log["loss"]


def test_warm_up_epochs_train_without_memory_and_validate_with_it():
    model, batch = make_model(**ADAPTIVE), make_batch()
    criterion = build_criterion("trime_loss", {"ce_warmup_epoch": 2}, model)
    plain = build_criterion("adaptive_loss", {}, model)(model, batch).sum
    joint = formula("trime_loss", model, batch)
    for epoch, expected in ((1, plain), (2, plain), (3, joint)):
        criterion.start_epoch(epoch)
        loss = criterion(model.train(), batch)
        assert_same(loss.sum.double(), expected.double())
        assert_same(loss.log["ori_loss"].double(), plain.detach().double())
        assert_same(loss.log["norm_loss"].double(), (joint if epoch == 3 else 0 * joint).detach())
        assert_same(criterion(model.eval(), batch).sum, joint)


def test_cross_sent_ratio_is_the_share_of_training_batches_without_their_own_past():
    model, batch = make_model(**ADAPTIVE), make_batch()
    with_past, without = (formula("trime_ext_loss", model, batch, cross=cross).item() for cross in (False, True))
    for ratio, expected in ((0.0, with_past), (1.0, without)):
        criterion = build_criterion("trime_ext_loss", {"cross_sent_ratio": ratio}, model)
        assert all(criterion(model, batch).sum.item() == pytest.approx(expected) for _ in range(5))
    criterion = build_criterion("trime_ext_loss", {"cross_sent_ratio": 0.9}, model)
    torch.manual_seed(0)
    found = [criterion(model, batch).sum.item() for _ in range(50)]
    share = sum(abs(x - without) < 1e-6 for x in found) / len(found)
    assert 0.75 < share < 1
    model.eval()
    assert all(criterion(model, batch).sum.item() == pytest.approx(with_past) for _ in range(5))


def test_features_that_are_not_numbers_are_told():
    model = make_model(**ADAPTIVE)
    criterion = build_criterion("trime_ext_loss", {}, model)
    model.decoder.layers[1].fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"17 memory keys .* 17 are not finite; .* lower --lr"):
        criterion(model, make_batch())
    with torch.inference_mode(), pytest.raises(ValueError, match="not finite"):
        criterion(model.eval(), make_batch())


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("trime_loss", {"ce_warmup_epoch": -1}, "--ce-warmup-epoch must not be negative, got -1"),
        ("trime_ext_loss", {"cross_sent_ratio": 1.5}, r"--cross-sent-ratio must lie in \[0, 1\], got 1.5"),
        ("trime_ext_loss", {"ce_warmup_epoch": -1}, "--ce-warmup-epoch must not be negative, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(name, given, said):
    with pytest.raises(ValueError, match=said):
        build_criterion(name, given, make_model(**PLAIN))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_the_key_is_refused(name):
    class Keyless(nn.Module):
        has_adaptive_softmax = False

    with pytest.raises(ValueError, match="needs a model that gives memory keys .* Keyless does not"):
        build_criterion(name, {}, Keyless())
    other = make_model(**PLAIN)
    other.config = SimpleNamespace(knn_keytype="attention_output")
    with pytest.raises(ValueError, match="attention_output"):
        build_criterion(name, {}, other)


class Stored(nn.Module):
    """The original's features, keys and softmax, in the place of a model."""

    has_adaptive_softmax = True

    def __init__(self, batch, state):
        super().__init__()
        self.x_BTD = nn.Parameter(batch["x"].clone())
        self.reps_TBD = nn.Parameter(batch["last_ffn_input_TBC"].clone())
        *cutoff, num_types = state["cutoff"]
        width = batch["x"].shape[2]
        bands = AdaptiveInput(num_types, PAD, width, 4.0, width, cutoff)
        self.softmax = AdaptiveSoftmax(num_types, width, cutoff, adaptive_input=bands, tie_proj=True)
        prefix = "decoder.adaptive_softmax."
        weights = {
            k.removeprefix(prefix): v for k, v in state["adaptive_softmax_state"].items() if k.startswith(prefix)
        }
        self.softmax.load_state_dict(weights)

    def key_dim(self, tap):
        return self.reps_TBD.shape[2]

    def forward(self, tokens_BT, key_tap=None):
        return SimpleNamespace(hidden_BTD=self.x_BTD, key_BTD=self.reps_TBD.transpose(0, 1))

    def target_logp(self, hidden_ND, target_N):
        return self.softmax.target_logp(hidden_ND, target_N)


ORIGINALS = {
    "trime_loss": ("trime_loss", {}),
    "trime_loss_cewarmup": ("trime_loss", {"ce_warmup_epoch": 1}),
    "trime_long_loss": ("trime_long_loss", {}),
    "trime_long_loss_same_device": ("trime_long_loss_same_device", {}),
    "trime_ext_loss_cross_sent_False": ("trime_ext_loss", {}),
    "trime_ext_loss_cross_sent_True": ("trime_ext_loss", {"cross_sent_ratio": 1.0}),
}


@pytest.mark.parametrize("original", sorted(ORIGINALS))
def test_the_originals_loss_and_gradients(original):
    if "FAIRSEQ_GOLDEN" not in os.environ:
        pytest.skip("FAIRSEQ_GOLDEN names no folder of figures")
    folder = Path(os.environ["FAIRSEQ_GOLDEN"]) / "trime" / "criterion"
    stored = torch.load(folder / "b4x64.pt", weights_only=True)
    expected = stored["results"][original]
    model = Stored(stored, torch.load(folder / "adaptive_softmax_state.pt", weights_only=True))
    batch = LMBatch(torch.arange(4), stored["src_tokens"], stored["target"], torch.ones_like(stored["target"]).bool())
    name, given = ORIGINALS[original]
    loss = build_criterion(name, given, model)(model, batch)
    assert loss.sum.item() == pytest.approx(expected["loss_sum_nats"].item(), rel=1e-5)
    loss.sum.backward()
    parameters = {f"decoder.adaptive_softmax.{k}": p.grad for k, p in model.softmax.named_parameters()}
    ours = parameters | {"x": model.x_BTD.grad, "reps": model.reps_TBD.grad}
    theirs = {k: v for k, v in expected["grad_softmax_params"].items() if k in ours}
    theirs |= {"x": expected["grad_x"], "reps": expected["grad_reps_TBC"]}
    assert len(theirs) >= 3
    for key, grad in theirs.items():
        if grad is not None:
            assert (ours[key] - grad).norm() <= 1e-4 * grad.norm(), key

"""prove beside evaluate: honest runs pass; a sum above 1, a model that sees ahead, a held text are found."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from fairseq.hf import KNNSaver, KNNWrapper, RetomatonWrapper, SentencePair, evaluate, prove, save_datastore, windows_of
from fairseq.memory.combiners.vocab_mixing import FixedWeighting, Weights

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    return tiny_models.make("gpt2").eval()


@pytest.fixture(scope="module")
def texts(model, tmp_path_factory):
    """Windows of the stored text and of another one, and the store's folder."""
    stored, other = (windows_of(tiny_models.tokens(1, 150, seed=seed)[0], 16, 12) for seed in (1, 2))
    folder = tmp_path_factory.mktemp("prove")
    with KNNSaver(dstore_dir=folder)(model) as saver:
        save_datastore(model, windows_of(tiny_models.tokens(1, 150, seed=1)[0], 16), saver)
    return stored, other, folder


def passed(proof):
    return [verdict.passed for verdict in proof.verdicts]


@pytest.mark.parametrize("kind", [KNNWrapper, RetomatonWrapper])
def test_honest_runs_pass_at_every_position(model, texts, kind):
    with kind(dstore_dir=texts[2], k=8, lmbda=0.3)(model) as memory:
        scores = evaluate(model, texts[1], memory)
        searched = getattr(memory, "num_searched", None)
        proof = prove(model, texts[1], scores, memory, positions="all")
        assert getattr(memory, "num_searched", None) == searched
    assert passed(proof) == [True] * 4
    assert proof.num_positions == len(scores.logp)
    assert len(proof.to_dict()["mass"]["words"]) > 20


def test_the_model_alone(model, texts):
    scores = evaluate(model, texts[1])
    for positions, count in (("sample", 1), ("7", 7), ("all", len(scores.logp))):
        proof = prove(model, texts[1], scores, positions=positions)
        assert passed(proof) == [True, True, None, None]
        assert proof.num_positions == count or (positions == "sample" and proof.num_positions >= 1)


def test_a_sum_above_one_is_found(model, texts, monkeypatch):
    def added(self, norm_C, logp_CV, found):
        return Weights(found.scores_NM, torch.full_like(norm_C, 0.3), torch.zeros_like(norm_C), self.temperature)

    monkeypatch.setattr(FixedWeighting, "__call__", added)
    with KNNWrapper(dstore_dir=texts[2], k=8, lmbda=0.3)(model) as memory:
        proof = prove(model, texts[1], evaluate(model, texts[1], memory), memory, positions="all")
    assert passed(proof) == [False, True, True, True]
    assert proof.verdicts[0].figures["mean"] == pytest.approx(1.3, abs=1e-4)


def test_scores_of_another_run_are_found(model, texts):
    scores = evaluate(model, texts[1])
    scores.logp_parts = [part + 0.01 for part in scores.logp_parts]
    assert passed(prove(model, texts[1], scores, positions="20"))[0] is False


def test_a_model_that_sees_ahead_is_found(texts):
    model = tiny_models.make("gpt2").eval()

    def ahead(module, given, output):
        output.logits = output.logits + 0.1 * output.logits.mean(1, keepdim=True)
        return output

    model.register_forward_hook(ahead)
    assert passed(prove(model, texts[1], evaluate(model, texts[1], batch_size=1), positions="20"))[1] is False


def test_a_store_of_the_text_is_found(model, texts):
    with KNNWrapper(dstore_dir=texts[2], k=8, lmbda=0.3)(model) as memory:
        proof = prove(model, texts[0], evaluate(model, texts[0], memory), memory, positions="3")
    assert passed(proof)[3] is False
    assert proof.verdicts[3].figures["shares"]["8"] > 0.5


def test_mistakes_are_one_line(model, texts):
    scores = evaluate(model, texts[1])
    with pytest.raises(ValueError, match="--prove few is neither"):
        prove(model, texts[1], scores, positions="few")
    with pytest.raises(ValueError, match="pairs of sentences"):
        prove(model, [SentencePair(torch.tensor([1]), torch.tensor([2]))], scores)
    other = tiny_models.make("gpt2").eval()
    with KNNWrapper(dstore_dir=texts[2], k=8)(other) as memory, pytest.raises(ValueError, match="in another model"):
        prove(model, texts[1], scores, memory)
    assert math.isfinite(scores.perplexity)

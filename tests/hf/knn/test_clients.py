"""Models that other programs wrap, compile, patch, train or call from threads: the mixture, or one clear error."""

from __future__ import annotations

import copy
import logging
import math
import threading
import types

import pytest
import torch
from stand_ins import Around, fuse_head
from tiny_models import VOCABULARY, inputs, make, tokens

from fairseq.hf.knn.evaluation import evaluate, windows_of
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper

SETTINGS = {"k": 6, "lmbda": 0.4, "knn_temp": 2.0}


@pytest.fixture
def model():
    return make("llama")


@pytest.fixture
def folder(model, tmp_path):
    with torch.no_grad(), KNNSaver(dstore_dir=tmp_path, dtype="float32")(model):
        model(**inputs(model, batch=6, length=16, seed=10))
    return tmp_path


def parts(model, ids):
    """Logits and keys of a call, and the keys and values of the store."""
    held = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: held.append(given[0]))
    logits = model(input_ids=ids).logits
    handle.remove()
    return logits, held[-1].detach()


def mixture(model, ids):
    """The formula with the text of the store, by autograd: log((1 - w) p_lm + w p_knn), neighbours constant."""
    text = inputs(model, batch=6, length=16, seed=10)["input_ids"]
    with torch.no_grad():
        keys, values = parts(model, text)[1][:, :-1].flatten(0, 1), text[:, 1:].flatten()
    logits, query = parts(model, ids)
    nearest = torch.cdist(query.flatten(0, 1), keys).square().topk(SETTINGS["k"], largest=False)
    share = (-nearest.values / SETTINGS["knn_temp"]).softmax(1)
    knn = torch.zeros(len(share), VOCABULARY).scatter_add_(1, values[nearest.indices], share).view_as(logits)
    return ((1 - SETTINGS["lmbda"]) * logits.softmax(-1) + SETTINGS["lmbda"] * knn).log()


def generated(model, prompt, count=5):
    with torch.no_grad():
        for _ in range(count):
            prompt = torch.cat([prompt, mixture(model, prompt)[:, -1].argmax(-1, keepdim=True)], 1)
    return prompt


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapper", [KNNWrapper, RetomatonWrapper])
@pytest.mark.parametrize(
    "call",
    [
        {"labels": torch.full((2, 7), -100)},
        {"labels": torch.full((2, 7), -100), "num_items_in_batch": 3},
        {"input_ids": tokens(2, 1), "labels": tokens(2, 1)},
        {"attention_mask": torch.zeros(2, 7, dtype=torch.int64)},
    ],
    ids=["all ignored", "counted", "one token each", "mask of zeros"],
)
@torch.no_grad()
def test_a_batch_without_targets_gives_what_the_model_gives(model, folder, wrapper, call):
    call = {"input_ids": tokens(2, 7)} | call
    plain = model(**call)
    with wrapper(dstore_dir=folder, **SETTINGS)(model):
        out = model(**call)
        close(out.logits, plain.logits.log_softmax(-1))
        if "labels" in call:
            torch.testing.assert_close(out.loss, plain.loss, equal_nan=True)
        after = model(**inputs(model)).loss
    ids = inputs(model)["input_ids"]
    close(after, -mixture(model, ids)[:, :-1].gather(2, ids[:, 1:, None]).mean())


def test_a_saver_takes_calls_without_targets(model, tmp_path):
    with torch.no_grad(), KNNSaver(dstore_dir=tmp_path)(model) as saver:
        model(input_ids=tokens(2, 7), labels=torch.full((2, 7), -100))
        model(**inputs(model, batch=1, length=4))
    assert saver.prefix is not None


@torch.no_grad()
def test_positional_arguments_reach_a_forward_of_args(model, folder):
    ids, expected, own = tokens(2, 7), mixture(model, tokens(2, 7)), model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        close(model(ids).logits, expected)
        with pytest.raises(ValueError, match="got 40 positional arguments, of which only"):
            model(*[None] * 40)
        close(model(ids).logits, expected)
    assert model.forward.__name__ == "<lambda>"


@torch.no_grad()
def test_a_model_within_another_one_is_wrapped_where_it_computes(model, folder):
    ids, outer = tokens(1, 7), Around(model)
    expected, text = mixture(model, ids), generated(model, ids)
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(outer) as knn:
        assert knn.model is model
        close(outer(ids).logits, expected)
        assert torch.equal(outer.generate(ids, max_new_tokens=5), text)
        assert len(evaluate(outer, windows_of(tokens(30), 10), knn).logp) == 27


@torch.no_grad()
def test_a_peft_model_generates_with_the_memory(model, folder):
    peft = pytest.importorskip("peft")
    ids = tokens(1, 7)
    expected, text = mixture(model, ids), generated(model, ids)
    outer = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    ).eval()
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(outer):
        close(outer(ids).logits, expected)
        assert torch.equal(outer.generate(input_ids=ids, max_new_tokens=5), text)


@torch.no_grad()
def test_compiled_models_give_the_mixture(model, folder):
    ids, expected = tokens(1, 7), mixture(model, tokens(1, 7))
    text, plain = generated(model, ids), model(ids).logits
    compiled = torch.compile(model, backend="eager")
    compiled(ids)
    for given in (model, compiled):
        with KNNWrapper(dstore_dir=folder, **SETTINGS)(given):
            close(compiled(ids).logits, expected)
            assert torch.equal(compiled.generate(ids, max_new_tokens=5), text)
            close(torch.compile(model, backend="eager")(ids).logits, expected)
        close(compiled(ids).logits, plain)
    model.compile(backend="eager")
    model.model.layers[-1].compile(backend="eager")
    model(ids)
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        close(model(ids).logits, expected)
    assert model._compiled_call_impl is not None


@torch.no_grad()
def test_a_forward_without_logits_is_one_clear_error(model, folder):
    own, ids, expected = model.forward, tokens(1, 7), mixture(model, tokens(1, 7))

    def fused(*args, labels=None, fused_lm_head=False, **kwargs):
        out = own(*args, labels=labels, **kwargs)
        if fused_lm_head:
            assert labels is not None
            out.logits = None
        return out

    model.forward = fused
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        with pytest.raises(ValueError, match="made no logits, and KNNWrapper mixes"):
            model(input_ids=ids, labels=ids, fused_lm_head=True)
        close(model(input_ids=ids, labels=ids).logits[:, :-1], expected[:, :-1])
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
        with pytest.raises(ValueError, match="was replaced after break_into"):
            model(input_ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("around", [lambda model: model, Around], ids=["called", "its forward called"])
def test_a_forward_that_leaves_the_wrapper_out_is_rejected(model, folder, around):
    ids, expected = tokens(1, 7), mixture(model, tokens(1, 7))
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        fuse_head(model)
        outer = around(model)
        with pytest.raises(ValueError, match="was replaced after break_into"):
            outer(input_ids=ids, labels=ids, fused_lm_head=True)
        close(outer(input_ids=ids).logits, expected)
        assert model.base_model(ids).last_hidden_state.shape == (1, 7, 16)  # without the head there is nothing to mix


@torch.no_grad()
def test_a_forward_that_is_bound_to_the_model_again_gives_the_mixture(model, folder):
    ids, expected = tokens(1, 7), mixture(model, tokens(1, 7))
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        model.forward = types.MethodType(model.forward, model)  # as accelerate's unwrap_model does
        close(model(ids).logits, expected)


def test_gradients_are_those_of_the_formula(model, folder):
    ids = tokens(2, 8)
    labels = ids.masked_fill(torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    expected = mixture(model, ids)
    counts = labels[:, 1:] != -100
    loss = -expected[:, :-1].gather(2, ids[:, 1:, None])[..., 0][counts].mean()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for wrapper in (KNNWrapper, RetomatonWrapper):
        more = {"no_pointer": True} if wrapper is RetomatonWrapper else {}
        with wrapper(dstore_dir=folder, **SETTINGS, **more)(model):
            out = model(input_ids=ids, labels=labels)
            found = torch.autograd.grad(out.loss, list(model.parameters()), retain_graph=True)
            by_logits = torch.nn.functional.nll_loss(out.logits[:, :-1][counts], ids[:, 1:][counts])
            again = torch.autograd.grad(by_logits, list(model.parameters()))
        for one, other, want in zip(found, again, wanted):
            torch.testing.assert_close(one, want, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(other, want, atol=1e-5, rtol=1e-3)


def test_threads_have_their_own_state(model, folder):
    prompts = [tokens(1, 7, seed=seed) for seed in range(3)]
    expected, found = [generated(model, prompt) for prompt in prompts], {}
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        for _ in range(3):
            threads = [
                threading.Thread(
                    target=lambda n=n: found.__setitem__(n, model.generate(prompts[n], max_new_tokens=5)), args=()
                )
                for n in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(torch.equal(found[n], expected[n]) for n in range(3))


@torch.no_grad()
def test_a_failing_call_leaves_the_wrapper_attached(model, folder):
    ids, expected = tokens(2, 7), mixture(model, tokens(2, 7))
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model) as knn:
        lookup = knn.memory.lookup
        knn.memory.lookup = lambda query: (_ for _ in ()).throw(OSError("the disk is gone"))
        with pytest.raises(OSError, match="the disk is gone"):
            model(input_ids=ids)
        knn.memory.lookup = lookup
        close(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_a_copy_of_the_model_and_a_wrapper_around_it_outlive_break_out(model, folder):
    ids, plain = tokens(1, 7), model(input_ids=tokens(1, 7)).logits
    knn = KNNWrapper(dstore_dir=folder, **SETTINGS)
    knn.break_into(model)
    twin, attached = copy.deepcopy(model), model.forward
    model.forward = lambda *args, **kwargs: attached(*args, **kwargs)  # as accelerate does
    knn.break_out()
    for each in (model, twin):
        assert torch.equal(each(input_ids=ids).logits, plain)


@torch.no_grad()
def test_early_exit_drafts_without_the_memory_and_changes_nothing(model, folder):
    ids = tokens(1, 7)
    expected = generated(model, ids)
    with KNNWrapper(dstore_dir=folder, **SETTINGS)(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, assistant_early_exit=1), expected)


@torch.no_grad()
def test_a_default_k_is_lowered_to_the_rows_of_a_small_store(model, folder, caplog):
    with caplog.at_level(logging.WARNING), KNNWrapper(dstore_dir=folder)(model) as knn:
        assert knn.memory.k == 90
        assert math.isfinite(float(model(**inputs(model)).loss))
    assert [record.message for record in caplog.records if "k=" in record.message] == [
        f"k=90: datastore {knn._place[0]}/dstore_llama_16 has fewer rows than the default k=1024"
    ]
    with pytest.raises(ValueError, match=r"k=91 is larger than datastore .* which has 90 rows; pass k=90 or less"):
        KNNWrapper(dstore_dir=folder, k=91).break_into(model)
    for settings, message in (({"lmbda": 2.0}, "^lmbda 2.0"), ({"knn_temp": 0.0}, "^knn_temp 0.0"), ({"k": 0}, "^k ")):
        with pytest.raises(ValueError, match=message):
            KNNWrapper(dstore_dir=folder, **settings)

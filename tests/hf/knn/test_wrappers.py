"""Saving, searching, evaluating and generating with every architecture; the oracle is the published formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, DECODERS, SEQ2SEQ, VOCABULARY, cache_in, inputs, make, resuming, shifted, tokens
from tiny_stores import K, by_hand, saved

from fairseq.hf.knn.evaluation import Window, evaluate, save_datastore, windows_of
from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.datastore.datastore import Datastore

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_and_loss_are_those_of_the_mixture(name, tmp_path):
    model = make(name)
    store = Datastore.open(saved(model, tmp_path))
    call = inputs(model, seed=1)
    plain = model(**call)
    knn = KNNWrapper(dstore_dir=tmp_path, k=K, lmbda=0.3)
    with knn(model):
        open_call = {key: value for key, value in call.items() if key != "labels"}
        if name in SEQ2SEQ:
            open_call["decoder_input_ids"] = shifted(model, call["labels"])
        found = model(**open_call)
        key = knn.tap
        with_labels = model(**call)
    from fairseq.hf.hooks.capture import capture_key

    with capture_key(key) as capture:
        model(**call)
    flat = capture.take(3).reshape(-1, key.dim)
    expected, is_clear = by_hand(plain.logits.view(-1, VOCABULARY), flat, store, 0.3)
    assert is_clear.mean() > 0.8
    expected[~is_clear] = found.logits.view(-1, VOCABULARY)[~is_clear]  # either of two rows may be the last neighbour
    expected = expected.reshape(3, -1, VOCABULARY)
    np.testing.assert_allclose(found.logits.numpy(), expected, rtol=2e-4, atol=2e-4)
    shift = 0 if name in SEQ2SEQ else 1
    scored = torch.from_numpy(expected)[:, : expected.shape[1] - shift]
    loss = torch.nn.functional.cross_entropy(scored.reshape(-1, VOCABULARY), call["labels"][:, shift:].reshape(-1))
    assert with_labels.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert with_labels.logits.logsumexp(-1).abs().max() < 1e-4
    assert torch.equal(model(**call).logits, plain.logits)  # nothing is left behind


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("wrapper", [KNNWrapper, RetomatonWrapper])
def test_generation_does_not_depend_on_the_batch(name, wrapper, tmp_path):
    model = make(name)
    saved(model, tmp_path, batches=8)
    prompts = [tokens(length, seed=length) for length in (3, 6, 5)]
    settings = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "return_dict_in_generate": True}
    with wrapper(dstore_dir=tmp_path, k=K, lmbda=0.5)(model):
        together = model.generate(**padded(prompts, name), output_scores=True, **settings)
        alone = [model.generate(**padded([prompt], name), output_scores=True, **settings) for prompt in prompts]
    plain = model.generate(**padded(prompts, name), **settings)
    for n, one in enumerate(alone):
        ours = together.sequences[n][together.sequences[n] != 0]
        assert torch.equal(ours, one.sequences[0][one.sequences[0] != 0])
        assert float(together.sequences_scores[n]) == pytest.approx(float(one.sequences_scores[0]), abs=1e-3)
    assert not torch.equal(plain.sequences, together.sequences)


def padded(prompts, name="gpt2"):
    """Prompts side by side; an encoder with learned positions wants its padding on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(
        prompts, batch_first=True, padding_side="right" if name in SEQ2SEQ else "left"
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("name", DECODERS)
def test_evaluation_in_bulk_equals_call_by_call(name, tmp_path):
    model = make(name)
    text = tokens(150, seed=3)
    saver = KNNSaver(dstore_dir=tmp_path)
    with saver(model):
        assert save_datastore(model, windows_of(tokens(200, seed=4), 16), saver, batch_size=3) == 187
    windows = windows_of(text, 20, 10)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model) as knn:
        done = evaluate(model, windows, knn, batch_size=4)
        one_by_one = evaluate(model, windows, knn, batch_size=1)
        losses, counts = [], []
        for window in windows:
            labels = window.ids_T.clone()
            labels[: window.num_context] = -100
            losses.append(float(model(input_ids=window.ids_T[None], labels=labels[None]).loss))
            counts.append(int((labels[1:] != -100).sum()))
    assert len(done.logp) == sum(counts) == 149
    assert torch.equal(done.targets, text[1:])
    torch.testing.assert_close(done.logp, one_by_one.logp, atol=2e-4, rtol=1e-4)
    assert done.perplexity == pytest.approx(math.exp(np.dot(losses, counts) / sum(counts)), rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("sampling", [{"do_sample": True, "top_k": 5}, {"do_sample": False}])
def test_generation_with_the_cache_equals_that_without(name, sampling, tmp_path):
    model = make(name)
    saved(model, tmp_path)
    prompt = padded([tokens(4), tokens(7)])
    with KNNWrapper(dstore_dir=tmp_path, k=K, lmbda=0.5)(model):
        out = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            out.append(model.generate(**prompt, use_cache=use_cache, max_new_tokens=8, **sampling))
    assert torch.equal(*out)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, tmp_path):
    model = make("llama")
    saved(model, tmp_path)
    ids = tokens(1, 7)
    pad = (3, 0) if side == "left" else (0, 3)
    with_pad = torch.nn.functional.pad(ids, pad)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model):
        alone = model(input_ids=ids).logits
        found = model(input_ids=with_pad, attention_mask=mask, position_ids=position).logits
    torch.testing.assert_close(found[mask.bool()], alone[0], atol=1e-4, rtol=1e-4)
    assert found.logsumexp(-1).abs().max() < 1e-4  # at padding too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    model = make("gpt2").to(dtype)
    saved(model, tmp_path)
    call = inputs(model, seed=1)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model):
        out = model(**call)
    assert out.logits.dtype is dtype
    assert out.logits.float().logsumexp(-1).abs().max() < 0.05
    whole = make("gpt2")
    with KNNWrapper(dstore_dir=tmp_path, k=K)(whole):
        assert out.loss.item() == pytest.approx(whole(**call).loss.item(), rel=0.02)
    assert out.loss.dtype is torch.float32


@pytest.mark.parametrize("wrapper", [KNNWrapper, RetomatonWrapper])
def test_weight_zero_is_the_model_itself(wrapper, tmp_path):
    model = make("gpt2")
    saved(model, tmp_path)
    call = inputs(model, seed=1)
    plain = model(**call)
    with wrapper(dstore_dir=tmp_path, k=K, lmbda=0.0)(model):
        out = model(**call)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.loss, plain.loss)


def test_a_tuple_is_returned_where_one_is_asked_for(tmp_path):
    model = make("gpt2")
    saved(model, tmp_path)
    call = inputs(model)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model):
        loss, logits, *_ = model(call["input_ids"], labels=call["labels"], return_dict=False)
        out = model(**call, num_items_in_batch=torch.tensor(54))
    assert logits.shape == (3, 10, VOCABULARY)
    assert out.loss.item() == pytest.approx(loss.item() * 27 / 54)


def test_only_the_last_position_is_searched_when_only_it_has_scores(tmp_path, monkeypatch):
    model = make("gpt2")
    saved(model, tmp_path)
    ids = tokens(2, 9)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model) as knn:
        whole = model(input_ids=ids).logits
        asked = []
        lookup = knn.memory.lookup
        monkeypatch.setattr(knn.memory, "lookup", lambda query: asked.append(len(query)) or lookup(query))
        last = model(input_ids=ids, logits_to_keep=1).logits
        some = model(input_ids=ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(some, whole[:, [1, 4]], atol=1e-4, rtol=1e-4)
    assert asked == [2, 4]


def test_saving_leaves_out_padding_and_labels_that_do_not_count(tmp_path):
    model = make("gpt2")
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    saver = KNNSaver(dstore_dir=tmp_path)
    with saver(model):
        model(input_ids=ids, labels=labels, attention_mask=mask)
    store = Datastore.open(saver.prefix)
    assert np.asarray(store.values).tolist() == [*ids[0, 3:].tolist(), *ids[1, 1:4].tolist()]
    assert store.documents.runs_R3.tolist() == [[0, 0, 3], [3, 1, 1]]
    assert store.metadata["key_tap"] == "last_ffn_input"
    assert store.metadata["dictionary_size"] == VOCABULARY


def interrupted(model, windows, saver, **more):
    """Save some windows and then be interrupted."""

    def run():
        with saver(model):
            save_datastore(model, windows, saver, **more)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_an_interrupted_save_goes_on_and_gives_the_same_store(tmp_path):
    model = make("gpt2")
    windows = windows_of(tokens(300, seed=2), 16)
    whole = KNNSaver(dstore_dir=tmp_path, name="whole")
    with whole(model):
        save_datastore(model, windows, whole, batch_size=2)
    cut = KNNSaver(dstore_dir=tmp_path, name="cut")
    interrupted(model, windows[:7], cut, batch_size=2)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    again = KNNSaver(dstore_dir=tmp_path, name="cut")
    with again(model):
        save_datastore(model, windows, again, batch_size=2)
    handle.remove()
    assert len(calls) == 7  # of ten batches, three were on disk; the fourth only in part
    stores = [Datastore.open(tmp_path / name) for name in ("whole", "cut")]
    assert stores[0].digest == stores[1].digest
    other = KNNSaver(dstore_dir=tmp_path, name="cut2")
    interrupted(model, windows[:6], other)
    other = KNNSaver(dstore_dir=tmp_path, name="cut2")
    with pytest.raises(ValueError, match="of another text or order"), other(model):
        save_datastore(model, windows_of(tokens(300, seed=9), 16), other)


def test_windows_score_every_token_but_the_first_once():
    for size, stride in ((8, 3), (8, 8), (5, 1)):
        windows = windows_of(list(range(50)), size, stride)
        scored = [w.ids_T[max(1, w.num_context) :] for w in windows]
        together = torch.cat(scored).tolist()
        assert together == (list(range(1, 50)) if stride < size else [n for n in range(50) if n % size])
    assert sum(len(w.ids_T) for w in windows_of(list(range(50)), 8, tail=False)) == 48
    with pytest.raises(ValueError, match="stride 9"):
        windows_of([1, 2], 8, 9)


def test_retomaton_carries_each_sequence_through_the_cache(tmp_path):
    model = make("gpt2")
    text = tokens(1, 40, seed=5)
    saver = KNNSaver(dstore_dir=tmp_path, dtype="float32")
    with saver(model):
        model(input_ids=text, labels=text)
    with RetomatonWrapper(dstore_dir=tmp_path, k=2, lmbda=0.9)(model) as reto:
        whole = model(input_ids=text).logits
        once = reto.num_searched
        assert reto.num_positions == 40
        assert once < 40
        cache = None
        parts = []
        for piece in text.split(7, dim=1):
            out = model(input_ids=piece, **resuming(model, cache))
            cache = cache_in(out)
            parts.append(out.logits)
        assert reto.num_searched == 2 * once
        assert reto.saved_share == 1 - once / 40
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-3, rtol=1e-3)
    assert "_reorder_cache" not in vars(model)


def test_retomaton_that_follows_nothing_is_knn(tmp_path):
    model = make("llama")
    saved(model, tmp_path)
    call = inputs(model, seed=1)
    out = []
    for wrapper, more in ((KNNWrapper, {}), (RetomatonWrapper, {"no_pointer": True})):
        with wrapper(dstore_dir=tmp_path, k=K, **more)(model):
            out.append(model(**call))
    torch.testing.assert_close(out[0].logits, out[1].logits)
    torch.testing.assert_close(out[0].loss, out[1].loss)


def test_an_empty_evaluation_has_no_tokens(tmp_path):
    model = make("gpt2")
    saved(model, tmp_path)
    with KNNWrapper(dstore_dir=tmp_path, k=K)(model) as knn:
        assert not len(evaluate(model, [Window(tokens(1))], knn).logp)


@pytest.mark.parametrize("name", ["gpt2", *SEQ2SEQ])
def test_retomaton_takes_its_state_along_with_the_beams(name, tmp_path):
    """A beam's score is the sum of what the same automaton gives its tokens when they are read one by one."""
    model = make(name)
    saved(model, tmp_path, batches=8)
    prompt = padded([tokens(5, seed=1), tokens(5, seed=2)])
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": 4, "do_sample": False, "length_penalty": 0.0}
    with RetomatonWrapper(dstore_dir=tmp_path, k=6, lmbda=0.9)(model) as reto:
        out = model.generate(**prompt, **settings, return_dict_in_generate=True, output_scores=True)
        assert 0 < reto.num_searched < reto.num_positions
        for n, sequence in enumerate(out.sequences):
            start = 1 if name in SEQ2SEQ else prompt["input_ids"].shape[1]
            total, cache, known = 0.0, None, {}
            for t in range(start, len(sequence)):
                given = sequence[None, :t] if t == start else sequence[None, t - 1 : t]
                call = {"input_ids": given} | resuming(model, cache)
                if name in SEQ2SEQ:
                    call = {"input_ids": prompt["input_ids"][n : n + 1], "decoder_input_ids": given} | known
                    call |= resuming(model, cache)
                elif t == start:
                    call["logits_to_keep"] = 1
                step = model(**call)
                cache = cache_in(step)
                total += float(step.logits[0, -1, sequence[t]])
            assert float(out.sequences_scores[n]) == pytest.approx(total, abs=2e-3)

"""Encoder-decoder models: the store, the mixture at every step of a beam search, and scores of pairs.

The oracle calls the bare model on one whole prefix after the other and mixes in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import SEQ2SEQ, VOCABULARY, make, shifted, tokens
from tiny_stores import K, by_hand

from fairseq.hf import KNNSaver, KNNWrapper, RetomatonWrapper, SentencePair, evaluate, save_datastore, windows_of
from fairseq.hf.hooks.taps import TAPS, KeyType, find_tap
from fairseq.hf.knn.evaluation import Window
from fairseq.hf.knn.stores import StorePlace
from fairseq.memory.datastore.datastore import Datastore

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_grad")

# What makes the keys, written down by hand: the last norm before the last decoder layer's feed-forward block.
NORMS = {
    "bart": "model.decoder.layers.1.encoder_attn_layer_norm",
    "m2m_100": "model.decoder.layers.1.final_layer_norm",
    "marian": "model.decoder.layers.1.encoder_attn_layer_norm",
    "mbart": "model.decoder.layers.1.final_layer_norm",
    "t5": "decoder.block.1.layer.2.layer_norm",
}
LENGTHS = [(6, 5), (3, 9), (7, 1), (4, 4), (2, 8), (5, 7)]
"""Tokens of sources and targets."""


def some_pairs(seed=0, copies=3):
    return [
        SentencePair(tokens(source, seed=seed + n), tokens(target, seed=100 + seed + n))
        for n, (source, target) in enumerate(LENGTHS * copies)
    ]


def forward(model, name, **call):
    """Logits and keys of a call of the bare model."""
    seen = []
    handle = model.get_submodule(NORMS[name]).register_forward_hook(lambda _, given, out: seen.append(out))
    logits = model(**call, use_cache=False).logits
    handle.remove()
    assert len(seen) == 1
    return logits, seen[0].view(*logits.shape[:2], -1)


def one_by_one(model, name, pairs):
    """Logits, keys and targets of all positions of the pairs, without any padding."""
    found = []
    for pair in pairs:
        target = pair.target_T[None]
        logits, key = forward(model, name, input_ids=pair.source_T[None], decoder_input_ids=shifted(model, target))
        found.append((logits[0], key[0], pair.target_T))
    return [torch.cat(each) for each in zip(*found)]


def saved_pairs(model, folder, pairs, batch_size=4):
    saver = KNNSaver(dstore_dir=folder, dtype="float32")
    with saver(model):
        rows = save_datastore(model, pairs, saver, batch_size=batch_size)
    assert rows == sum(len(pair.target_T) for pair in pairs)
    return Datastore.open(saver.prefix)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_store_has_a_row_for_each_target_token(name, tmp_path):
    model = make(name)
    pairs = some_pairs()
    _, key, target = one_by_one(model, name, pairs)
    in_bulk = saved_pairs(model, tmp_path / "bulk", pairs)
    saver = KNNSaver(dstore_dir=tmp_path / "calls", dtype="float32")
    with saver(model):
        for pair, other in zip(pairs[::2], pairs[1::2]):
            two = torch.nn.utils.rnn.pad_sequence([pair.target_T, other.target_T], True, -100)
            source = torch.nn.utils.rnn.pad_sequence([pair.source_T, other.source_T], True, 0)
            model(input_ids=source, attention_mask=(source != 0).long(), labels=two)
    by_calls = Datastore.open(saver.prefix)
    assert by_calls.metadata["model_type"] == name
    for store in (in_bulk, by_calls):
        assert len(store) == len(target) == 3 * sum(length for _, length in LENGTHS)
        assert np.asarray(store.values).tolist() == target.tolist()
        np.testing.assert_allclose(np.asarray(store.keys), key.numpy(), atol=2e-5)
        starts = np.cumsum([0] + [len(pair.target_T) for pair in pairs])[:-1]
        assert store.documents.runs_R3[:, 0].tolist() == starts.tolist()


class Prefixes(transformers.LogitsProcessor):
    """Notes what every live beam holds at each step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(input_ids.clone())
        return scores


def sources():
    ids = torch.nn.utils.rnn.pad_sequence([tokens(length, seed=length) for length in (6, 3, 5)], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


FORCED = {
    "mbart": {"decoder_start_token_id": 7},
    "m2m_100": {"forced_bos_token_id": 9},
    "bart": {"forced_bos_token_id": 4},
}


def searched(model, name, **more):
    """A beam search: prefixes of all beams and their logits, step after step."""
    prefixes = Prefixes()
    out = model.generate(
        **sources(), num_beams=4, do_sample=False, max_new_tokens=7, logits_processor=[prefixes], output_logits=True,
        return_dict_in_generate=True, output_scores=True, **FORCED.get(name, {}), **more,
    )  # fmt: skip
    assert len(out.logits) == len(prefixes.steps) >= 5
    return out, prefixes.steps


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_every_step_of_a_beam_search_is_the_mixture(name, tmp_path):
    model, bare = make(name), make(name)
    store = saved_pairs(model, tmp_path, some_pairs())
    with KNNWrapper(dstore_dir=tmp_path, k=K, lmbda=0.7)(model):
        out, steps = searched(model, name)
    plain, _ = searched(make(name), name)
    assert not torch.equal(plain.sequences_scores, out.sequences_scores)
    repeated = {key: value.repeat_interleave(4, 0) for key, value in sources().items()}
    checked = 0
    for prefix, found in zip(steps, out.logits):
        logits, key = forward(bare, name, **repeated, decoder_input_ids=prefix)
        expected, is_clear = by_hand(logits[:, -1], key[:, -1], store, 0.7)
        np.testing.assert_allclose(found.numpy()[is_clear], expected[is_clear], rtol=2e-4, atol=2e-4)
        checked += int(is_clear.sum())
    assert checked > 0.9 * 12 * len(steps)
    forced = FORCED.get(name, {})
    if "forced_bos_token_id" in forced:
        assert (out.sequences[:, 1] == forced["forced_bos_token_id"]).all()
    assert (out.sequences[:, 0] == forced.get("decoder_start_token_id", bare.config.decoder_start_token_id)).all()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_beam_search_in_bfloat16_is_the_mixture_but_for_rounding(name, tmp_path):
    model, bare = make(name).bfloat16(), make(name).bfloat16()
    store = saved_pairs(model, tmp_path, some_pairs())
    with KNNWrapper(dstore_dir=tmp_path, k=K, lmbda=0.4)(model):
        out, steps = searched(model, name)
    repeated = {key: value.repeat_interleave(4, 0) for key, value in sources().items()}
    errors = []
    for prefix, found in zip(steps, out.logits):
        logits, key = forward(bare, name, **repeated, decoder_input_ids=prefix)
        expected, _ = by_hand(logits[:, -1], key[:, -1], store, 0.4)
        errors.append(np.abs(np.exp(expected) - found.float().exp().numpy()).max(1))
    assert np.mean(np.concatenate(errors) < 0.05) > 0.9  # elsewhere the k-th neighbour is another one


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("wrapper", [KNNWrapper, RetomatonWrapper])
def test_pairs_are_scored_by_the_formula_whatever_they_are_batched_with(name, wrapper, tmp_path):
    model = make(name)
    store = saved_pairs(model, tmp_path, some_pairs())
    pairs = some_pairs(seed=50, copies=2)
    logits, key, target = one_by_one(model, name, pairs)
    plain = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    more = {} if wrapper is KNNWrapper else {"min_knns": 4}
    with wrapper(dstore_dir=tmp_path, k=K, lmbda=0.4, **more)(model) as memory:
        scores = [evaluate(model, pairs, memory, batch_size=size) for size in (1, 3, 7)]
        alone = [evaluate(model, [pair], memory).logp for pair in pairs]
    for each in scores:
        assert torch.equal(each.targets, target)
        torch.testing.assert_close(each.lm_logp, plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(each.logp, torch.cat(alone), atol=1e-5, rtol=0)
    if wrapper is KNNWrapper:
        expected, is_clear = by_hand(logits, key, store, 0.4)
        expected = np.take_along_axis(expected, target.numpy()[:, None], 1)[:, 0]
        assert is_clear.mean() > 0.9
        np.testing.assert_allclose(scores[0].logp.numpy()[is_clear], expected[is_clear], rtol=1e-4, atol=1e-4)
    without = evaluate(model, pairs, batch_size=3)
    assert torch.equal(without.logp, without.lm_logp)
    assert without.perplexity == pytest.approx(math.exp(-float(plain.double().mean())), rel=1e-5)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_weight_zero_is_the_model_itself_in_generation_too(name, tmp_path):
    model = make(name)
    saved_pairs(model, tmp_path, some_pairs())
    plain, _ = searched(model, name)
    plain_scores = evaluate(model, some_pairs(seed=50)).logp
    for wrapper in (KNNWrapper, RetomatonWrapper):
        with wrapper(dstore_dir=tmp_path, k=K, lmbda=0.0)(model) as memory:
            out, _ = searched(model, name)
            assert torch.equal(evaluate(model, some_pairs(seed=50), memory).logp, plain_scores)
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_encoder_is_neither_saved_nor_mixed(name, tmp_path):
    model = make(name)
    saver = KNNSaver(dstore_dir=tmp_path)
    labels = tokens(3, 5, seed=9)
    plain = model.get_encoder()(**sources()).last_hidden_state
    with saver(model):
        encoded = model.get_encoder()(**sources())
        assert saver.rows_done == 0
        model(encoder_outputs=encoded, attention_mask=sources()["attention_mask"], labels=labels)
        assert saver.rows_done == 15
    with KNNWrapper(dstore_dir=tmp_path, k=K, lmbda=0.9)(model):
        assert torch.equal(model.get_encoder()(**sources()).last_hidden_state, plain)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_killed_run_over_pairs_resumes(name, tmp_path):
    model = make(name)
    whole = saved_pairs(model, tmp_path / "whole", some_pairs())

    def killed():
        yield from some_pairs()[:10]
        raise KeyboardInterrupt

    saver = KNNSaver(dstore_dir=tmp_path / "resumed", dtype="float32")
    with pytest.raises(KeyboardInterrupt), saver(model):
        save_datastore(model, killed(), saver, batch_size=4)
    again = saved_pairs(model, tmp_path / "resumed", some_pairs())
    assert np.array_equal(np.asarray(again.keys), np.asarray(whole.keys))
    assert np.array_equal(again.documents.runs_R3, whole.documents.runs_R3)


def test_windows_and_pairs_are_for_models_of_their_own_kind():
    windows = windows_of(tokens(20), 8)
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration has an encoder .*; got a Window"):
        evaluate(make("bart"), windows)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel reads Window\(ids\); got a SentencePair"):
        evaluate(make("gpt2"), some_pairs())
    assert isinstance(windows[0], Window)


@pytest.mark.parametrize("rows", [None, 105])
def test_a_type_of_model_that_ends_in_a_number_finds_its_store(rows, tmp_path):
    model = make("m2m_100")
    saver = KNNSaver(rows, dstore_dir=tmp_path)
    with saver(model):
        save_datastore(model, some_pairs()[:18], saver) if rows is None else [
            model(input_ids=tokens(5, 4), labels=tokens(5, 21))
        ]
    for name in (tmp_path, saver.prefix):
        assert StorePlace.find(name, "m2m_100", rows, 16).prefix == saver.prefix
    with pytest.raises(ValueError, match="holds no datastore of a m2m_100 model of 7 rows"):
        StorePlace.find(tmp_path, "m2m_100", 7) if rows else StorePlace.find(tmp_path, "m2m_100", 7, 8)


def test_an_encoder_is_never_tapped_for_a_decoder_that_is_not_known(monkeypatch):
    """The encoder has as many layers, of the same parts, under a name that does not say what it is."""
    model = make("bart")
    monkeypatch.delitem(TAPS, "bart")
    decoder, encoder = model.model.decoder, model.model.encoder
    del model.model.encoder, model.model.decoder
    model.model.reader, model.model.decoder = encoder, decoder
    assert find_tap(model, KeyType.last_ffn_input).module is decoder.layers[1].fc1
    for layer in decoder.layers:
        layer.strange, layer.fc1 = layer.fc1, None
    with pytest.raises(ValueError, match=r"no feed-forward block found .* model.decoder.layers \(2 x BartDecoderLayer"):
        find_tap(model, KeyType.last_ffn_input)


def test_a_model_made_of_two_is_tapped_in_its_decoder():
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
    )
    gpt2 = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2)
    model = transformers.EncoderDecoderModel(config)
    assert find_tap(model, KeyType.last_ffn_input).module is model.decoder.transformer.h[1].mlp

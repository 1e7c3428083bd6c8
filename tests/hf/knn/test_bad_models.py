"""What cannot work is one clear error, and the model is left as it was."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import inputs, make, tokens, transformers

from fairseq.hf.knn.retomaton import RetomatonWrapper
from fairseq.hf.knn.saver import KNNSaver
from fairseq.hf.knn.wrapper import KNNWrapper
from fairseq.memory.datastore.datastore import Datastore

pytestmark = pytest.mark.usefixtures("no_grad")


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


@pytest.fixture
def model():
    return make("gpt2")


@pytest.fixture
def folder(model, tmp_path):
    with KNNSaver(dstore_dir=tmp_path, tokenizer=Tokenizer("a", "b"))(model):
        model(**inputs(model, batch=4, length=12))
    return tmp_path


def hooks(model):
    return [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]


def refuses(what, message, model, **kept):
    before = [tuple(map(dict, pair)) for pair in hooks(model)]
    names = set(vars(model))
    with pytest.raises(ValueError, match=message) as caught:
        what()
    assert "\n" not in str(caught.value)
    assert [tuple(map(dict, pair)) for pair in hooks(model)] == before
    assert set(vars(model)) == names


def test_a_model_without_an_output_embedding(folder):
    model = transformers.AutoModel.from_config(make("gpt2").config)
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(model), "no output embedding", model)


def test_a_model_that_does_not_predict_the_next_token(folder):
    config = transformers.AutoConfig.for_model(
        "bert", vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.AutoModelForMaskedLM.from_config(config)
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(model), "does not predict the next token", model)


@pytest.mark.parametrize("attachment", [KNNSaver, KNNWrapper, RetomatonWrapper])
def test_an_encoder_loaded_as_a_decoder_reads_what_it_is_to_predict(folder, attachment):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.AutoConfig.for_model("bert", vocab_size=48, initializer_range=0.3, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    refuses(lambda: attachment(dstore_dir=folder).break_into(model), "BertLMHeadModel reads the tokens that it", model)
    assert all(module.training for module in model.modules())
    config.is_decoder = True
    model = transformers.AutoModelForCausalLM.from_config(config)
    with KNNSaver(dstore_dir=folder / "decoder", knn_keytype="final_hidden")(model):
        model(**inputs(model))


def test_another_vocabulary_or_tokenizer(model, folder):
    other = make("gpt2", vocab_size=50)
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(other), "vocabulary of 48 tokens.*has 50", other)
    knn = KNNWrapper(dstore_dir=folder, k=4, tokenizer=Tokenizer("b", "a"))
    refuses(lambda: knn.break_into(model), "another tokenizer", model)
    with KNNWrapper(dstore_dir=folder, k=4, tokenizer=Tokenizer("a", "b"))(model):
        assert model(**inputs(model)).loss.isfinite()


def test_another_key_type_or_width(model, folder):
    knn = KNNWrapper(dstore_dir=folder, k=4, knn_keytype="last_ffn_output")
    refuses(lambda: knn.break_into(model), "keys of last_ffn_input.*last_ffn_output", model)
    wide = make("gpt2", n_embd=32)
    refuses(lambda: KNNWrapper(dstore_dir=f"{folder}/dstore_gpt2_16", k=4).break_into(wide), "width 16.*32", wide)
    refuses(lambda: KNNWrapper(dstore_dir=folder, dimension=8, k=4).break_into(model), "width 16, dimension", model)
    refuses(lambda: KNNWrapper(dstore_dir=folder, dstore_size=7, k=4).break_into(model), "44 rows.*7", model)
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=45).break_into(model), "45 is larger", model)


def test_missing_labels_while_saving(model, tmp_path):
    names = set(vars(model))
    saver = KNNSaver(dstore_dir=tmp_path)
    with saver(model):
        with pytest.raises(ValueError, match="saving needs labels"):
            model(input_ids=tokens(1, 4))
        model(**inputs(model, batch=1, length=4))  # it is still attached
    assert saver.rows_done == 0
    assert len(Datastore.open(saver.prefix)) == 3
    assert not any(a or b for a, b in hooks(model))
    assert set(vars(model)) == names


def test_a_store_of_another_model_is_replaced_on_demand_only(model, tmp_path, caplog):
    def save(**more):
        with KNNSaver(dstore_dir=tmp_path, name="s", dtype="float32", **more)(model) as saver:
            model(**inputs(model, batch=1, length=6))
        return Datastore.open(saver.prefix).keys.take(torch.arange(5))

    before = save()
    assert not caplog.records
    assert torch.equal(save(), before)
    assert "this model's complete datastore is there, and is replaced" in caplog.text
    with torch.no_grad():
        model.transformer.h[-1].ln_2.weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"complete and its model is .* or replace the store with overwrite_dstore=True"
    ):
        save()
    assert torch.equal(Datastore.open(tmp_path / "s").keys.take(torch.arange(5)), before)
    assert not any(a or b for a, b in hooks(model))
    assert not torch.equal(save(overwrite_dstore=True), before)


def test_a_call_whose_keys_are_rejected_leaves_no_trace_in_the_store(model, tmp_path):
    saver = KNNSaver(dstore_dir=tmp_path)
    with saver(model):
        model(**inputs(model, batch=2, length=5))
        block = model.transformer.h[-1].ln_2
        weight = block.weight.data.clone()
        block.weight.data.fill_(float("inf"))
        with pytest.raises(ValueError, match="NaN or infinity"):
            model(**inputs(model, batch=2, length=5, seed=1))
        block.weight.data.copy_(weight)
        model(**inputs(model, batch=2, length=5, seed=2))
    store = Datastore.open(saver.prefix)
    expected = [inputs(model, batch=2, length=5, seed=seed)["labels"][:, 1:].reshape(-1) for seed in (0, 2)]
    assert store.values.take(torch.arange(16)).tolist() == torch.cat(expected).tolist()
    assert store.documents.runs_R3[:, 0].tolist() == [0, 4, 8, 12]


def test_a_wrapper_is_in_one_model_once(model, folder):
    other = make("gpt2", seed=1)
    knn = KNNWrapper(dstore_dir=folder, k=4)
    with knn(model):
        refuses(lambda: knn.break_into(model), "in this GPT2LMHeadModel already", model)
        refuses(lambda: knn.break_into(other), "in another GPT2LMHeadModel", other)
        second = RetomatonWrapper(dstore_dir=folder, k=4)
        refuses(lambda: second.break_into(model), "has a KNNWrapper in it already", model)
    knn.break_out()  # once more changes nothing
    with second(model), KNNWrapper(dstore_dir=folder, k=4)(other):
        assert model(**inputs(model)).loss.isfinite()


def test_quantised_and_offloaded_models(model, folder):
    class Quantizer:
        quantization_config = type("Config", (), {"quant_method": "bitsandbytes"})

    model.hf_quantizer = Quantizer()
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(model), r"quantised \(bitsandbytes\)", model)
    del model.hf_quantizer
    with torch.device("meta"):
        away = transformers.AutoModelForCausalLM.from_config(model.config)
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(away), "offloaded", away)


def test_stores_that_are_not_there_or_several(model, folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    refuses(lambda: KNNWrapper(dstore_dir=empty).break_into(model), "no datastore of a gpt2 model.*has: none", model)
    refuses(lambda: KNNWrapper(dstore_dir=empty / "x").break_into(model), "neither a folder nor", model)
    with KNNSaver(dstore_dir=folder, name="second")(model):
        model(**inputs(model, length=12))
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4).break_into(model), "several stores: .*second", model)
    with KNNWrapper(dstore_dir=folder / "second", k=4)(model):
        assert model(**inputs(model)).loss.isfinite()


def test_no_load_keys_without_an_index(model, folder):
    refuses(lambda: KNNWrapper(dstore_dir=folder, k=4, no_load_keys=True).break_into(model), "no_load_keys", model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"lmbda": 1.5}, "1.5 is not in"),
        ({"knn_temp": 0.0}, "not positive"),
        ({"probe": 0}, "probe must be at least 1"),
        ({"knn_keytype": "last_fnn_input"}, "did you mean 'last_ffn_input'"),
        ({"knn_sim_func": "cosine"}, "known: dot, l2"),
        ({"no_load_keys": True, "recompute_dists": True}, "drop one"),
        ({"dstore_size": -1}, "dstore_size must be"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        KNNWrapper(**settings)
    with pytest.raises(ValueError, match="min_knns"):
        RetomatonWrapper(min_knns=0)


def test_a_failing_call_leaves_the_wrapper_in_place(model, folder):
    with KNNWrapper(dstore_dir=folder, k=4)(model):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        assert model(**inputs(model)).loss.isfinite()
    assert not any(a or b for a, b in hooks(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "^code_size=64 does not divide the width 16; give 16"),
        ({"code_size": 4, "ncentroids": 99}, "^ncentroids=99 is more than the datastore's 44 rows; give about 1"),
        ({"code_size": 4, "ncentroids": 1}, "44 rows, compression learns from at least 256; build none: without an"),
    ],
)
def test_an_index_that_cannot_be_built_names_python_arguments(model, tmp_path, settings, message):
    saver = KNNSaver(dstore_dir=tmp_path)
    with saver(model):
        model(**inputs(model, batch=4, length=12))
    with pytest.raises(ValueError, match=message):
        saver.build_index(**settings)


def test_messages_name_what_to_do(model, tmp_path):
    saver = KNNSaver(dstore_size=5, dstore_dir=tmp_path)
    with pytest.raises(ValueError, match=re.escape("announced with 5 rows")), saver(model):
        model(**inputs(model))
    with pytest.raises(ValueError, match="no store was saved yet"):
        KNNSaver(dstore_dir=tmp_path).build_index()
    assert not any(a or b for a, b in hooks(model))

"""Exploring transformers models: a datastore's figures are run_clm.py's, attended memories what the model returns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from explorer_oracle import check_schema, column, packed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(clm, corpus, tmp_path):
    """Words of run_clm.py for the valid text, with a store of train in tmp_path/store."""
    shared = ("--dstore_dir", tmp_path / "store", "--block_size", 16)
    clm("--train_file", corpus / "train.txt", "--eval_subset", "train", "--do_eval", "--save_knnlm_dstore", *shared)
    return ("--validation_file", corpus / "valid.txt", "--do_eval", "--lines_per_group", 20, *shared)


def words(corpus, tiny_gpt2, tmp_path):
    text = ("--model", tiny_gpt2, "--text", corpus / "valid.txt", "--lines-per-group", 20, "--block-size", 16)
    return (*text, "--dstore-dir", tmp_path / "store", "--k", 8, "--lmbda", 0.4, "--knn-temp", 2)


@pytest.mark.parametrize("kind", ["knn", "retomaton"])
def test_a_datastore_is_what_run_clm_evaluates(kind, clm, saved, explored, corpus, tiny_gpt2, tmp_path):
    more, ours = ("--knn",), ()
    if kind == "retomaton":
        more, ours = ("--retomaton", "--min_knns", 2), ("--retomaton", "--min-knns", 2)
    clm(*saved, *more, "--k", 8, "--lmbda", 0.4, "--knn_temp", 2, "--save_scores", tmp_path / "scores.npz")
    (results,) = (tmp_path / "out").glob("eval*results.json")
    figures, scores = json.loads(results.read_text()), np.load(tmp_path / "scores.npz")
    explanation = explored("hf", *words(corpus, tiny_gpt2, tmp_path), *ours)
    assert explanation.kind == kind
    check_schema(explanation)
    np.testing.assert_allclose(column(explanation, "mixed"), scores["logprob"], atol=1e-6)
    sums = explanation.combined(explanation.opening)["sums"]["mixed"]
    name = next(name for name in figures if name.endswith("perplexity"))
    assert sums["perplexity"] == pytest.approx(figures[name], rel=1e-6)
    details = explanation.details(5)
    said = dict(zip(packed(details["lm"]["token"]).tolist(), packed(details["lm"]["logp"])))
    assert said[int(column(explanation, "token")[5])] == pytest.approx(column(explanation, "lm")[5], abs=1e-5)
    if kind == "retomaton":
        searched = column(explanation, "searched")
        assert 0 < searched.sum() < len(searched)
    made = explanation.reader.read(explanation.reader.encode("w3 w9 w28"), only_next=False)
    assert made["tokens"]["text"] == ["w3", "w9", "w28"]
    assert made["next"]["neighbors"]


def test_a_store_of_another_tokenizer_is_one_line(saved, explored, corpus, tiny_gpt2, tmp_path):
    other = tmp_path / "other"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(other)
    tokenizer = json.loads((tiny_gpt2 / "tokenizer.json").read_text())
    names = tokenizer["model"]["vocab"]
    names["w1"], names["w2"] = names["w2"], names["w1"]
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (other / name).write_text((tiny_gpt2 / name).read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="was saved with another tokenizer"):
        explored("hf", *words(corpus, other, tmp_path))


def test_a_text_that_is_not_utf8_is_named(explored, corpus, tiny_gpt2, tmp_path):
    (path := tmp_path / "latin.txt").write_bytes(b"w1 \xff w2")
    model = ["--model", tiny_gpt2]
    with pytest.raises(ValueError, match=r"--text .*latin.txt is not UTF-8 .*; convert it"):
        explored("extended-mind", *model, "--text", path, "--memory", corpus / "train.txt")
    with pytest.raises(ValueError, match=r"--memory .*latin.txt is not UTF-8 .*; convert it"):
        explored("extended-mind", *model, "--text", corpus / "test.txt", "--memory", path)


def test_attended_memories_are_the_models_own(explored, corpus, tiny_gpt2, tmp_path):
    memory = tmp_path / "memory.txt"
    memory.write_text("w3 w9 w28 w14 w42 w57\n" * 4)
    text = tmp_path / "text.txt"
    text.write_text("w5 w15 w46 w3 w9 w28 w14\n")
    explanation = explored("extended-mind", "--model", tiny_gpt2, "--text", text, "--memory", memory, "--topk", 3)
    from fairseq.hf.attention.wrapper import ExtendedMind

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = torch.tensor([tokenizer("w5 w15 w46 w3 w9 w28 w14\n")["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits[0].log_softmax(1)
        with ExtendedMind(model, [memory.read_text()], tokenizer=tokenizer, topk=3) as mind:
            mixed = model(ids, output_retrieved_memory_idx=True).logits[0].log_softmax(1)
            selected = mind.retrieved[0]
    target = ids[0, 1:, None]
    np.testing.assert_allclose(column(explanation, "lm"), plain[:-1].gather(1, target)[:, 0], atol=1e-5)
    np.testing.assert_allclose(column(explanation, "mixed"), mixed[:-1].gather(1, target)[:, 0], atol=1e-5)
    attention = explanation.details(3)["attention"]
    assert [layer["layer"] for layer in attention["layers"]] == [0, 1]
    for layer in attention["layers"]:
        weights = selected[layer["layer"]].weights()[0, :, 3]
        assert layer["share"] == pytest.approx(float(weights.sum()) / len(weights), abs=1e-5)
        best = layer["tokens"][0]
        chosen = selected[layer["layer"]].token_BHTK[0, :, 3]
        by_hand = torch.zeros(100).index_add_(0, chosen.flatten(), weights.flatten()) / len(weights)
        assert best["weight"] == pytest.approx(float(by_hand.max()), abs=1e-5)
        assert best["place"] == int(by_hand.argmax())
    assert attention["citations"]
    check_schema(explanation)
    made = explanation.reader.read(explanation.reader.encode("w3 w9"), only_next=False)
    assert {"lm", "mixed", "attention"} <= made["next"].keys()
    assert made["details"][1]["attention"]["layers"]

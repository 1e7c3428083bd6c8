"""The memory of model_args in a model, and the harness's answers with it, against plain computation."""

import json

import numpy as np
import pytest
import served_models
import tiny_models
import torch
from served_models import prompt, words_of
from tiny_stores import by_hand, saved

from fairseq.hf import RetomatonWrapper, extended_mind
from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import find_tap
from fairseq.hf.lm_eval.memory import MemoryArguments, attached_memory
from fairseq.memory.datastore.datastore import Datastore

KNN = {"k": 8, "lmbda": 0.4}


@pytest.fixture(scope="module")
def model():
    return served_models.endless(tiny_models.make("llama"))


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return saved(model, tmp_path_factory.mktemp("lm_eval"), name="s", tokenizer=served_models.tokenizer())


def mixture(model, store, ids):
    """Log-probabilities of kNN-LM after each token, (T, V), by the formula."""
    with torch.no_grad(), capture_key(find_tap(model, KeyType.last_ffn_input)) as capture:
        logits = model(torch.tensor([ids])).logits[0]
        key = capture.take(1)[0]
    return torch.from_numpy(by_hand(logits, key, Datastore.open(store), 0.4)[0])


def test_the_store_is_mixed_in(model, store):
    ids = prompt(9, seed=1)
    arguments, rest = MemoryArguments.split({"dstore_dir": store, **KNN, "batch_size": 4, "indexfile": None})
    assert rest == {"batch_size": 4}
    assert arguments.described() == {"dstore_dir": store, **KNN}
    with torch.no_grad(), attached_memory(model, served_models.tokenizer(), arguments):
        found = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found.double(), mixture(model, store, ids), atol=2e-5, rtol=0)


def test_retomaton_and_extended_mind_are_the_wrappers(model, store, tmp_path):
    ids, text = torch.tensor([prompt(9, seed=2)]), words_of(prompt(20, seed=3))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = served_models.tokenizer()
    with torch.no_grad(), RetomatonWrapper(dstore_dir=store, **KNN, min_knns=3)(model):
        followed = model(ids, labels=ids).logits
    retomaton = MemoryArguments(dstore_dir=store, **KNN, retomaton=True, min_knns=3)
    with torch.no_grad(), attached_memory(model, tokenizer, retomaton):
        assert torch.equal(model(ids, labels=ids).logits, followed)
    with torch.no_grad(), extended_mind(model, text, tokenizer=tokenizer, topk=3):
        attended = model(ids).logits
    with (
        torch.no_grad(),
        attached_memory(model, tokenizer, MemoryArguments(extended_mind=str(tmp_path / "text.txt"), topk=3)),
    ):
        assert torch.equal(model(ids).logits, attended)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, attended)


def test_misspelt_names_and_missing_files_are_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"unknown name 'lmbd' in --model_args \(did you mean 'lmbda'\?\)"):
        MemoryArguments.split({"dstore_dir": store, "lmbd": 0.4})
    assert MemoryArguments.split({"dstore_dir": store, "lmbd": 0.4}, {"lmbd"})[1] == {"lmbd": 0.4}
    with pytest.raises(ValueError, match="extended_mind=.*none: no such file; name a text"):
        MemoryArguments(extended_mind=str(tmp_path / "none"))


def test_arguments_without_a_memory_are_rejected():
    with pytest.raises(ValueError, match="--model hf evaluates a model without one"):
        MemoryArguments.split({"batch_size": 4})
    with pytest.raises(ValueError, match="retomaton is about a datastore"):
        MemoryArguments(extended_mind="x", retomaton=True)


TASK = """\
task: tiny_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{context}}}}"
target_delimiter: " "
"""
CHOICES = 'doc_to_target: answer\ndoc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
ROLLING = 'doc_to_target: "{{context}}"\nmetric_list: [{metric: word_perplexity}]\n'


@pytest.mark.parametrize("kind", ["knn", "retomaton", "extended_mind"])
def test_the_harness_gives_what_plain_computation_gives(model, store, tmp_path, kind):
    """A local task through the registered name, with batches of 1 and 8.

    kNN-LM against the formula, the others against the model with the memory called for one text alone.
    """
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from fairseq.hf.lm_eval.model import NAME, MemoryLM

    assert get_model(NAME) is MemoryLM
    tokenizer = served_models.tokenizer()
    documents = [
        {"context": words_of(prompt(5 + n, seed=n)), "answer": 0}
        | {"choices": [words_of(prompt(1 + each, seed=50 + 3 * n + each)) for each in range(3)]}
        for n in range(5)
    ]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    for name, kind, more in (("choices", "multiple_choice", CHOICES), ("rolling", "loglikelihood_rolling", ROLLING)):
        text = TASK.format(name=name, data=data, output_type=kind) + more
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "text.txt").write_text(words_of(prompt(20, seed=3)), encoding="utf-8")
    settings = {"dstore_dir": store, **KNN}
    if kind == "retomaton":
        settings |= {"retomaton": True, "min_knns": 3}
    elif kind == "extended_mind":
        settings = {"extended_mind": str(tmp_path / "text.txt"), "topk": 3}
    found = {}
    for batch_size in (1, 8):
        harness = MemoryLM(model, tokenizer=tokenizer, **settings, batch_size=batch_size, max_length=64, device="cpu")
        results = simple_evaluate(
            model=harness,
            tasks=["tiny_choices", "tiny_rolling"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        assert harness.get_model_info()["memory"] == settings
        harness.detach()
        samples = {name: sorted(each, key=lambda s: s["doc_id"]) for name, each in results["samples"].items()}
        found[batch_size] = [
            *(float(answer[0][0]) for sample in samples["tiny_choices"] for answer in sample["resps"]),
            *(float(sample["resps"][0][0]) for sample in samples["tiny_rolling"]),
        ]
    np.testing.assert_allclose(found[1], found[8], atol=1e-4)

    def scores(ids):
        if kind == "knn":
            return mixture(model, store, ids)
        with torch.no_grad(), attached_memory(model, tokenizer, MemoryArguments(**settings)):
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    wanted = []
    for document in documents:
        context = tokenizer(document["context"])["input_ids"]
        for choice in document["choices"]:
            whole = context + tokenizer(choice)["input_ids"]
            wanted.append(_logp(scores(whole), whole, len(context)))
    for document in documents:
        whole = [tokenizer.bos_token_id, *tokenizer(document["context"])["input_ids"]]
        wanted.append(_logp(scores(whole), whole, 1))
    np.testing.assert_allclose(found[1], wanted, atol=1e-4)


def _logp(logp_TV, ids, start):
    """Log-probability of the tokens from ``start`` on."""
    return float(sum(logp_TV[place - 1, ids[place]] for place in range(start, len(ids))))

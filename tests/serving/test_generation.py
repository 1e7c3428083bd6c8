"""Answers of the server against ``generate`` called directly, and log-probabilities against the published formula."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import served_models
import tiny_models
import torch
from served_models import continuation, prompt, serving, words_of
from tiny_stores import by_hand

from fairseq.hf import KNNWrapper, RetomatonWrapper, extended_mind
from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import find_tap
from fairseq.memory.datastore.datastore import Datastore

SETTINGS = {"k": 8, "lmbda": 0.4, "knn_temp": 2.0}


def with_store(llama, folder, name="a", **more):
    return KNNWrapper(dstore_dir=f"{folder}/{name}", **SETTINGS | more)(llama)


def test_200_requests_of_16_clients_none_lost_or_mixed_up(served, llama, llama_stores):
    """Prompts, lengths, stores, settings and seeds differ; each answer is the one of its request."""
    settings = [{}, None, {"name": "b", "lmbda": 0.6}, {"k": 3, "knn_temp": 5.0}]
    options = [{}, {"knn": False}, {"knn": {"store": "b", "lambda": 0.6}}, {"knn": {"k": 3, "temperature": 5}}]
    cases = [(prompt(3 + n % 9, seed=n), 2 + n % 6, n % 4, 40 + n if n % 3 == 0 else None) for n in range(50)]

    def ask(number):
        ids, count, kind, seed = cases[number % 50]
        sampling = {} if seed is None else {"temperature": 0.8, "top_p": 0.9, "seed": seed}
        return served.tokens(ids, max_tokens=count, **options[kind], **sampling)

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(200)))
    wanted = {}
    for kind, of_kind in enumerate(settings):
        with nullcontext() if of_kind is None else with_store(llama, llama_stores, **of_kind):
            for number in range(kind, 50, 4):
                ids, count, _, seed = cases[number]
                sampling = {} if seed is None else {"temperature": 0.8, "top_p": 0.9}
                wanted[number] = continuation(llama, ids, count, seed, **sampling)
    assert answers == [wanted[number % 50] for number in range(200)]
    assert len({tuple(tokens) for tokens in wanted.values()}) > 40


@pytest.mark.parametrize("first", [11, -5, 2**63 - 1])
def test_choices_have_the_seeds_after_each_other(served, llama, llama_stores, first):
    ids = prompt(5, seed=1)
    answer = served.complete(ids, max_tokens=5, n=3, temperature=1.0, seed=first)
    with with_store(llama, llama_stores):
        assert [choice["token_ids"] for choice in answer["choices"]] == [
            continuation(llama, ids, 5, seed, temperature=1.0) for seed in (first, first + 1, first + 2)
        ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20}


def test_the_models_own_generation_config_holds(llama, llama_stores):
    """A repetition penalty and an end that generate knows without being told."""
    other = tiny_models.make("llama")
    other.generation_config.repetition_penalty = 3.0
    other.generation_config.pad_token_id = 0
    ids = prompt(6, seed=2)
    first = continuation(other, ids, 8)
    other.generation_config.eos_token_id = first[4]
    with serving(other, store=(f"a={llama_stores}/a",), k=8, weight=0.4, knn_temp=2.0) as served:
        answer = served.complete(ids, max_tokens=8, knn=False)["choices"][0]
    assert answer["token_ids"] == continuation(other, ids, 8) == first[: first.index(first[4]) + 1]
    assert answer["finish_reason"] == "stop"


def test_log_probabilities_are_the_mixtures(served, llama, llama_stores):
    """Of prompt and continuation, against the formula in float64."""
    ids = prompt(9, seed=3)
    choice = served.complete(ids, max_tokens=4, echo=True, logprobs=3)["choices"][0]
    whole = choice["token_ids"]
    with torch.no_grad(), capture_key(find_tap(llama, KeyType.last_ffn_input)) as capture:
        logits_TV = llama(torch.tensor([whole])).logits[0]
        key_TD = capture.take(1)[0]
    store = Datastore.open(f"{llama_stores}/a")
    scaled = _with_temperature(logits_TV, key_TD, store, 0.4, 2.0)
    found = choice["logprobs"]
    wanted = [scaled[place, token] for place, token in enumerate(whole[1:])]
    np.testing.assert_allclose(found["token_logprobs"][1:], wanted, atol=2e-5)
    assert found["token_logprobs"][0] is None
    for place, top in enumerate(found["top_logprobs"][1:]):
        best = sorted(scaled[place])[-3:]
        np.testing.assert_allclose(sorted(top.values()), best, atol=2e-5)
    assert choice["text"] == words_of(whole)
    assert [choice["text"][start:].split()[0] for start in found["text_offset"]] == found["tokens"]


def _with_temperature(logits, key, store, weight, temperature):
    """The formula, for keys and queries whose squared distances are divided by the temperature."""
    shrunk = Datastore(
        store.prefix, np.asarray(store.keys, np.float64) / temperature**0.5, store.values, store.metadata, True
    )
    return by_hand(logits, key.double() / temperature**0.5, shrunk, weight)[0]


def test_neighbors_are_the_stores_rows(served, llama, llama_stores):
    ids = prompt(7, seed=4)
    choice = served.complete(ids, max_tokens=3, neighbors=2, knn={"k": 5})["choices"][0]
    store = Datastore.open(f"{llama_stores}/a")
    keys = np.asarray(store.keys)
    for count, neighbors in enumerate(choice["neighbors"]):
        whole = ids + choice["token_ids"][:count]
        with torch.no_grad(), capture_key(find_tap(llama, KeyType.last_ffn_input)) as capture:
            llama(torch.tensor([whole]))
            query = capture.take(1)[0, -1].numpy()
        distance = ((keys - query) ** 2).sum(1)
        nearest = np.argsort(distance, kind="stable")[:5]
        share = np.exp(-distance[nearest] / 2.0)
        assert [each["row"] for each in neighbors] == nearest[:2].tolist()
        np.testing.assert_allclose([each["distance"] for each in neighbors], distance[nearest[:2]], rtol=1e-4)
        np.testing.assert_allclose([each["weight"] for each in neighbors], (share / share.sum())[:2], rtol=1e-3)
        for each in neighbors:
            document, offset = store.where(np.array([each["row"]]))
            text = tiny_models.tokens(4, 12, seed=10 + int(document[0]) // 4)[int(document[0]) % 4]
            assert (each["document"], each["offset"]) == (int(document[0]), int(offset[0]))
            assert each["token"] == words_of([text[each["offset"]]])
            assert each["before"] == words_of(text[1 : each["offset"]])
            assert each["after"] == words_of(text[each["offset"] + 1 :])


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_the_whole_answer_says(served, echo):
    body = {"prompt": prompt(6, seed=5), "max_tokens": 7, "seed": 3, "n": 2, "logprobs": 1, "neighbors": 1}
    body |= {"echo": echo}
    whole = served.post("/v1/completions", **body)
    chunks = _chunks(served, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert choice["text"].startswith(words_of(body["prompt"])) == echo
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [choice["finish_reason"]]
        for field in ("tokens", "token_logprobs", "text_offset"):
            parts = [each["logprobs"][field] for each in mine if each["logprobs"]]
            assert sum(parts, []) == pytest.approx(choice["logprobs"][field])
        assert sum((each.get("neighbors", []) for each in mine), []) == choice["neighbors"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def _chunks(served, path, body):
    with served.client.stream("POST", path, json=body | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stop_string_ends_the_text_before_it(served):
    ids = prompt(6, seed=6)
    choice = served.complete(ids, max_tokens=10)["choices"][0]
    words = choice["text"].split()
    stop = f"{words[3]} {words[4]}"
    body = {"prompt": ids, "max_tokens": 10, "temperature": 0, "stop": ["nothing", stop]}
    stopped = served.post("/v1/completions", **body)["choices"][0]
    assert stopped["text"] == choice["text"][: choice["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    chunks = _chunks(served, "/v1/completions", body)
    assert "".join(each["text"] for chunk in chunks for each in chunk["choices"]) == stopped["text"]


def test_several_prompts_and_texts(served):
    texts = [words_of(prompt(5, seed=7)), words_of(prompt(8, seed=8))]
    answer = served.complete(texts, max_tokens=3, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for number, text in enumerate(texts):
        alone = served.complete(text, max_tokens=3)["choices"][0]
        assert [choice["text"] for choice in answer["choices"][2 * number :][:2]] == [alone["text"]] * 2


def test_impossible_tokens_have_the_log_probability_that_openai_names(served):
    """With the neighbours alone most tokens are impossible, and JSON has no infinity."""
    knn = {"lambda": 1, "k": 1}
    body = {"prompt": prompt(6, seed=8), "max_tokens": 2, "temperature": 0, "logprobs": 3, "echo": True, "knn": knn}
    found = served.post("/v1/completions", **body)["choices"][0]["logprobs"]
    assert set(found["token_logprobs"][1:6]) <= {0.0, -9999.0}
    assert found["token_logprobs"][6:] == [0.0, 0.0]
    assert all(sorted(top.values()) == [-9999.0, -9999.0, 0.0] for top in found["top_logprobs"][1:])
    parts = [each["choices"][0]["logprobs"] for each in _chunks(served, "/v1/completions", body)]
    assert sum((part["token_logprobs"] for part in parts if part), []) == found["token_logprobs"]
    chat = {"messages": [{"role": "user", "content": "w5"}], "logprobs": True, "top_logprobs": 2, "knn": knn}
    answer = served.post("/v1/chat/completions", **chat, max_tokens=1, temperature=0)["choices"][0]
    assert [each["logprob"] for each in answer["logprobs"]["content"][0]["top_logprobs"]] == [0.0, -9999.0]


def test_an_answer_can_be_sent_back_as_it_came(served):
    messages = [{"role": "user", "content": "w5"}]
    body = {"max_tokens": 2, "temperature": 0}
    messages.append(served.post("/v1/chat/completions", messages=messages, **body)["choices"][0]["message"])
    messages.append({"role": "user", "content": "w6"})
    whole = served.post("/v1/chat/completions", messages=messages, **body)
    messages[1] = {"role": "assistant", "content": messages[1]["content"], "tool_calls": None, "annotations": []}
    assert served.post("/v1/chat/completions", messages=messages, **body)["choices"] == whole["choices"]
    messages[1]["tool_calls"] = [{"id": "a"}]
    assert served.post("/v1/chat/completions", 400, messages=messages, **body)["error"]["param"] == (
        "messages[1].tool_calls"
    )


def test_chat_is_a_completion_of_the_template(served):
    ids = prompt(4, seed=9)
    messages = [
        {"role": "system", "content": words_of(ids)},
        {"role": "user", "content": [{"type": "text", "text": "w5"}]},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = served.post("/v1/chat/completions", **body)
    plain = served.complete([47, *ids, 47, 5, 3], max_tokens=4, logprobs=2)["choices"][0]
    choice = answer["choices"][0]
    assert choice["message"]["content"] == plain["text"]
    assert [each["token"] for each in choice["logprobs"]["content"]] == plain["logprobs"]["tokens"]
    top = [{e["token"]: e["logprob"] for e in each["top_logprobs"]} for each in choice["logprobs"]["content"]]
    assert top == plain["logprobs"]["top_logprobs"]
    chunks = _chunks(served, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(each["delta"].get("content", "") for chunk in chunks for each in chunk["choices"])
    assert text == plain["text"]


def test_retomaton_follows_as_its_wrapper_does(llama, llama_stores):
    prompts = [prompt(4 + n, seed=20 + n) for n in range(6)]
    store = f"{llama_stores}/a"
    with serving(llama, store=(f"a={store}",), k=8, weight=0.4, knn_temp=2.0, retomaton=3) as served:
        with ThreadPoolExecutor(6) as clients:
            found = list(clients.map(lambda ids: served.tokens(ids, max_tokens=10), prompts))
        lookups, searches = served.figure("fairseq_lookups_total"), served.figure("fairseq_searches_total")
    wanted, positions, searched = [], 0, 0
    with RetomatonWrapper(dstore_dir=store, **SETTINGS, min_knns=3)(llama) as reto:
        wanted = [continuation(llama, ids, 10) for ids in prompts]
        positions, searched = reto.num_positions, reto.num_searched
    assert found == wanted
    assert (lookups, searches) == (positions, searched)
    assert searches < lookups


def test_memories_inside_attention_are_attended_to(llama, tmp_path):
    memory = words_of(prompt(30, seed=30))
    (tmp_path / "notes.txt").write_text(memory, encoding="utf-8")
    ids, tokenizer = prompt(6, seed=31), served_models.tokenizer()
    options = [{}, {"extended_mind": {"topk": 1}}, {"extended_mind": False}, {}]
    mind = {"extended_mind": str(tmp_path / "notes.txt"), "topk": 4}
    with serving(llama, tokenizer, **mind) as served, ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda more: served.tokens(ids, max_tokens=6, **more), options))
    with extended_mind(llama, memory, tokenizer=tokenizer, topk=4):
        wanted = continuation(llama, ids, 6)
        assert found == [wanted, continuation(llama, ids, 6, topk=1), found[2], wanted]
    assert found[2] == continuation(llama, ids, 6)
    assert len({tuple(each) for each in found}) > 1


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_models_whose_caches_cannot_be_padded_are_served_one_by_one(name):
    """Sliding windows keep less than all tokens."""
    other = served_models.endless(tiny_models.make(name))
    prompts = [prompt(5, seed=40), prompt(9, seed=41)]
    with serving(other) as served, ThreadPoolExecutor(2) as clients:
        found = list(clients.map(lambda ids: served.tokens(ids, max_tokens=6), prompts))
    assert found == [continuation(other, ids, 6) for ids in prompts]


def test_a_client_that_goes_away_frees_its_place(served):
    """A long generation is given up; what waits behind it is answered."""
    before = served.figure("fairseq_cancelled_total")
    body = {"prompt": prompt(4, seed=50), "max_tokens": 55, "stream": True, "n": 16}
    with served.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert len(served.tokens(prompt(4, seed=51), max_tokens=3)) == 3
    assert _soon(lambda: served.figure("fairseq_running") == 0)
    assert served.figure("fairseq_cancelled_total") == before + 1


def _soon(is_so, seconds=10.0):
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if is_so():
            return True
        waiting.wait(0.02)
    return False


def test_the_openai_package_is_a_client(served):
    openai = pytest.importorskip("openai")
    http = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=served.address.url + "v1", api_key="none", http_client=http)
    ids = prompt(5, seed=60)
    wanted = served.complete(ids, max_tokens=5, logprobs=2)["choices"][0]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, logprobs=2)
    assert answer.choices[0].text == wanted["text"]
    assert answer.choices[0].logprobs.token_logprobs == wanted["logprobs"]["token_logprobs"]
    more = {"knn": {"lambda": 0.1, "store": "b"}, "neighbors": 1}
    messages = [{"role": "user", "content": "w5 w6"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "extra_body": more}
    whole = client.chat.completions.create(**chat)
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(whole.choices[0].neighbors) == 4
    assert [each.id for each in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.completions.create(model="other", prompt="w5")
    with pytest.raises(openai.BadRequestError, match="temperature must be from"):
        client.completions.create(model="tiny", prompt="w5", temperature=9)

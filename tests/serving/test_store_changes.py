"""Documents added to and deleted from the stores of a server, also by one that is killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import served_models
import tiny_models
import torch
from dying import dies_at_event
from served_models import prompt, serving, words_of
from tiny_stores import saved

from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.hooks.capture import capture_key
from fairseq.hf.hooks.names import KeyType
from fairseq.hf.hooks.taps import find_tap
from fairseq.hf.knn.saver import KNNSaver
from fairseq.memory.datastore.datastore import Datastore
from fairseq.serving.memories.minds import MindStore
from fairseq.serving.memories.stores import ServedStore, StoreSettings, first_to_join

WRITING = {"writable": True, "k": 8, "weight": 0.4, "knn_temp": 2.0}


@pytest.fixture
def store(llama, tmp_path):
    """Prefix of a store of its own."""
    return saved(llama, tmp_path, name="s", batches=1, tokenizer=served_models.tokenizer())


def keys_and_values(llama, ids):
    """The rows of a text that the model reads at once, by a hook of its own."""
    with torch.no_grad(), capture_key(find_tap(llama, KeyType.last_ffn_input)) as capture:
        llama(torch.tensor([ids]))
        return capture.take(1)[0, :-1].numpy(), ids[1:]


def test_added_documents_are_found_and_deleted_ones_are_not(llama, store):
    ids, other = prompt(12, seed=70), prompt(9, seed=71)
    with serving(llama, served_models.tokenizer(), store=(f"s={store}",), **WRITING) as served:
        answer = served.post("/stores/s/documents", 201, documents=[words_of(ids), {"tokens": other}])
        assert answer == {"store": "s", "documents": [4, 5]}
        assert served.client.get("/stores/s/documents/4").json()["tokens"] == ids[1:]
        nearest = served.post("/search", text=words_of(ids[:6]), k=1)["results"][0][0]
        assert (nearest["document"], nearest["offset"]) == (4, 6)
        assert nearest["distance"] == pytest.approx(0.0, abs=1e-4)
        assert nearest["after"] == words_of(ids[7:])
        assert served.client.delete("/stores/s/documents/4").json()["deleted_rows"] == 11
        gone = served.client.get("/stores/s/documents/4")
        assert gone.status_code == 404
        assert gone.json()["error"]["message"] == "document 4 of store 's' was deleted"
        assert served.client.delete("/stores/s/documents/4").status_code == 404
        assert "documents are 0 to 5" in served.client.get("/stores/s/documents/6").json()["error"]["message"]
        found = served.post("/search", text=words_of(ids[:6]), k=44)["results"][0]
        assert {each["document"] for each in found} == {0, 1, 2, 3, 5}
        facts = served.client.get("/stores/s").json()
        assert (facts["rows"], facts["deleted_rows"], facts["documents"]) == (63, 11, 6)
        assert served.figure("fairseq_documents_added_total") == 2
        by_key = served.post("/search", keys=[list(range(16))] * 2, k=3)["results"]
    opened = Datastore.open(f"{store}.served")
    opened.verify()
    distance = ((np.asarray(opened.keys) - np.arange(16)) ** 2).sum(1)
    distance[opened.deleted] = np.inf
    assert [each["row"] for each in by_key[0]] == np.argsort(distance, kind="stable")[:3].tolist()
    keys, values = keys_and_values(llama, other)
    np.testing.assert_allclose(np.asarray(opened.keys)[-8:], keys, atol=1e-5)
    assert np.asarray(opened.values)[-8:].tolist() == values
    assert len(Datastore.open(store)) == 44, "the original store stays as it is"


def test_the_mixture_is_that_of_a_store_saved_of_all_text(llama, store, tmp_path):
    """What the server answers after additions, against a store that was saved whole."""
    texts = [prompt(12, seed=80), prompt(7, seed=81)]
    ids = texts[0][:5]
    with serving(llama, store=(f"s={store}",), **WRITING) as served:
        before = served.complete(ids, max_tokens=6, logprobs=0)["choices"][0]
        served.post("/stores/s/documents", 201, documents=texts)
        after = served.complete(ids, max_tokens=6, logprobs=0)["choices"][0]
    saver = KNNSaver(dstore_dir=tmp_path, dtype="float32", name="whole")
    with torch.no_grad(), saver(llama):
        from tiny_models import inputs

        llama(**inputs(llama, batch=4, length=12, seed=10))
        for text in texts:
            llama(input_ids=torch.tensor([text]), labels=torch.tensor([text]))
    with serving(llama, store=(f"w={saver.prefix}",), k=8, weight=0.4, knn_temp=2.0) as served:
        whole = served.complete(ids, max_tokens=6, logprobs=0)["choices"][0]
    assert after["token_ids"] == whole["token_ids"]
    assert after["logprobs"]["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-5)
    assert after["logprobs"]["token_logprobs"] != before["logprobs"]["token_logprobs"]


def test_long_documents_are_read_with_context(llama, store):
    """Each row of a document that is longer than a window has the key of a window with context before it."""
    ids = prompt(30, seed=90)
    with serving(llama, store=(f"s={store}",), window=16, **WRITING) as served:
        served.post("/stores/s/documents", 201, documents=[ids])
        assert served.client.get("/stores/s/documents/4").json()["tokens"] == ids[1:]
    opened = Datastore.open(f"{store}.served")
    document, offset = opened.where(np.arange(44, 44 + 29))
    assert document.tolist() == [4] * 29
    assert offset.tolist() == list(range(1, 30))
    keys, _ = keys_and_values(llama, ids[8:24])
    np.testing.assert_allclose(np.asarray(opened.keys)[44 + 15 : 44 + 23], keys[7:15], atol=1e-5)


def test_an_index_and_later_rows_are_searched_together(llama, tmp_path):
    saver = KNNSaver(dstore_dir=tmp_path, dtype="float16", name="i")
    with torch.no_grad(), saver(llama):
        for seed in range(12):
            text = torch.tensor([prompt(40, seed=200 + seed)] * 2)
            text[1] = torch.tensor(prompt(40, seed=300 + seed))
            llama(input_ids=text, labels=text)
    saver.build_index(ncentroids=8, code_size=4)
    ids = prompt(12, seed=72)
    with serving(llama, store=(f"i={saver.prefix}",), probe=8, **WRITING) as served:
        served.post("/stores/i/documents", 201, documents=[ids])
        found = served.post("/search", tokens=ids[:6], k=8)["results"][0]
        assert (found[0]["document"], found[0]["offset"]) == (24, 6)
        assert found[1]["document"] < 24
        assert [each["distance"] for each in found] == sorted(each["distance"] for each in found)
        first = found[1]["document"]
        served.client.delete(f"/stores/i/documents/{first}")
        served.client.delete("/stores/i/documents/24")
        rest = served.post("/search", tokens=ids[:6], k=897)["results"][0]
        assert len(rest) == 23 * 39
        assert {each["document"] for each in rest} == set(range(24)) - {first}


def test_changes_need_a_writable_store_and_whole_documents(llama, store):
    with serving(llama, served_models.tokenizer(), store=(f"s={store}",), k=8) as served:
        error = served.post("/stores/s/documents", 403, documents=["w5 w6"])["error"]["message"]
        assert "start the server with --writable" in error
        assert served.client.delete("/stores/s/documents/0").status_code == 403
        assert served.client.get("/stores/t").status_code == 404
        assert served.client.get("/stores").json()["stores"][0]["name"] == "s"
    wrong = [
        ({}, "documents is missing"),
        ({"documents": []}, "must be a list with items"),
        ({"documents": ["w5"]}, "documents[0] has one token"),
        ({"documents": ["w5 w6", {"text": "w5", "tokens": [5]}]}, "documents[1] must have either text or tokens"),
        ({"documents": [{"words": 1}]}, "unknown field 'documents[0].words'"),
        ({"documents": ["w5 w6"] * 257}, "at most 256 items"),
        ({"documents": ["w5 w6"], "more": 1}, "unknown field 'more'"),
    ]
    search = [
        ({}, "give one of text, tokens and keys, got none"),
        ({"text": "w5", "tokens": [5]}, "got text and tokens"),
        ({"keys": [1.0, "a"]}, "must be a list of numbers"),
        ({"keys": [1.0]}, "keys have 1 numbers, those of the store 16"),
        ({"text": "w5", "k": 45}, "k must be from 1 to 44, got 45"),
        ({"text": "w5", "store": "t"}, "there is no store 't'"),
    ]
    with serving(llama, served_models.tokenizer(), store=(f"s={store}",), **WRITING) as served:
        for body, reason in wrong:
            assert reason in served.post("/stores/s/documents", 400, **body)["error"]["message"]
        for body, reason in search:
            answer = served.client.post("/search", json=body)
            assert answer.status_code in (400, 404)
            assert reason in answer.json()["error"]["message"]
        for number in range(3):
            assert served.client.delete(f"/stores/s/documents/{number}").status_code == 200
        last = served.client.delete("/stores/s/documents/3")
        assert last.status_code == 400
        assert "all 44 rows" in last.json()["error"]["message"]
        assert served.client.get("/stores/s").json()["rows"] == 44


def test_the_second_server_that_writes_a_store_is_refused(llama, store):
    with serving(llama, store=(f"s={store}",), **WRITING):
        with (
            pytest.raises(OSError, match="another process is writing datastore"),
            serving(llama, store=(f"s={store}",), **WRITING),
        ):
            pass
        with serving(llama, store=(f"s={store}",), k=8) as reader:
            assert reader.tokens([5, 6], max_tokens=2)
    with serving(llama, store=(f"s={store}",), **WRITING) as served:
        assert served.tokens([5, 6], max_tokens=2)


def test_many_additions_become_few_parts(llama, store, monkeypatch):
    """Every document stays as it is, with its number; few rows are copied more than a few times."""
    parts, copied = [], 0
    for rows in np.random.default_rng(0).integers(1, 50, 3000).tolist():
        first = first_to_join(parts)
        if first is not None:
            copied += sum(parts[first:])
            parts[first:] = [sum(parts[first:])]
        parts.append(rows)
    assert len(parts) <= 31
    assert copied <= 5 * sum(parts)
    monkeypatch.setattr("fairseq.serving.memories.stores._JOINED_PARTS", 4)
    decoder, texts = RowDecoder(llama, [KeyType.last_ffn_input]), [prompt(4 + n % 5, seed=600 + n) for n in range(12)]
    served = ServedStore("s", store, llama, None, StoreSettings(k=4, writable=True, window=64))
    for text in texts:
        list(served.add([text], decoder))
    served.delete(5)
    list(served.add([texts[0]], decoder))
    decoder.close()
    assert len(served.store.shards) <= 6
    served.store.verify()
    held = [_tokens(served, number) for number in range(4, 17) if number != 5]
    assert held == [text[1:] for number, text in enumerate([*texts, texts[0]]) if number != 1]
    served.close()
    files = {path.name.split("_")[0] for path in Path(f"{store}.served").iterdir()}
    assert len([name for name in files if name.startswith("added")]) <= 2 * len(served.store.shards)


def _tokens(served, number):
    return served.store.values.take(served.rows_of(number)).tolist()


def test_memories_inside_attention_change_too(llama, tmp_path):
    from fairseq.hf import extended_mind

    path, texts = str(tmp_path / "mind.safetensors"), [prompt(14, seed=95), prompt(10, seed=96), prompt(12, seed=97)]
    with extended_mind(llama, texts[:2], topk=4, add_first_token=False) as mind:
        mind.save_memory(path)
    options = {"extended_mind": path, "topk": 4, "writable": True}
    name = "/stores/extended-mind"
    with serving(llama, **options) as served:
        before = served.tokens([5, 6, 7], max_tokens=8)
        assert served.post(f"{name}/documents", 201, documents=[texts[2]])["documents"] == [2]
        assert served.client.get(f"{name}/documents/2").json()["tokens"] == texts[2]
        assert served.client.delete(f"{name}/documents/1").status_code == 200
        assert served.client.get(f"{name}/documents/1").json()["error"]["code"] == "document_deleted"
        changed = served.tokens([5, 6, 7], max_tokens=8)
    with serving(llama, **options) as served:
        assert served.tokens([5, 6, 7], max_tokens=8) == changed
        facts = served.client.get(name).json()
        assert (facts["documents"], facts["tokens"]) == (3, 36)
        with pytest.raises(OSError, match="another process is writing memory"):
            MindStore("m", path, tiny_models.make("llama"), None, topk=4, writable=True)
    assert changed != before


def test_a_death_at_any_moment_of_an_addition_leaves_all_or_nothing(llama, store, monkeypatch):
    """After each renaming and removal of a file in turn; the next server has what was acknowledged before."""
    decoder = RowDecoder(llama, [KeyType.last_ffn_input])
    texts = [prompt(6 + n % 5, seed=100 + n) for n in range(60)]
    settings = StoreSettings(k=4, writable=True, window=64)
    kept, event = [], 0
    while True:
        served = ServedStore("s", store, llama, None, settings)
        held = _documents(served)
        assert held[: len(kept)] == kept
        assert len(held) - len(kept) in (0, 1), "all or nothing of what was not acknowledged"
        assert held[len(kept) :] in ([], [texts[event - 1][1:]])
        kept = held
        try:
            with dies_at_event(monkeypatch, event, aside=("serving",)):
                list(served.add([texts[event]], decoder))
        except pytest.fail.Exception:  # the addition ended before so many events
            break
        finally:
            served.close()
        event += 1
    decoder.close()
    assert event > 4
    served = ServedStore("s", store, llama, None, settings)
    assert _documents(served) == [*kept, texts[event][1:]]
    served.store.verify()
    served.close()


def _documents(served):
    """Tokens of the documents that were added."""
    total = served.describe()["documents"]
    return [_tokens(served, number) for number in range(4, total)]


def test_a_server_that_is_killed_keeps_what_it_acknowledged(llama, store, tmp_path, forks):
    """kill -9 while documents come, twice; the files are whole, and every acknowledged document is there."""
    forks.load("transformers", "uvicorn", "starlette.applications", "fairseq.serving.opening", "fairseq_cli.web.serve")
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    served_models.tokenizer().save_pretrained(folder)
    texts = [prompt(5 + n % 7, seed=500 + n) for n in range(400)]
    sent, known = [], {}
    for round_ in range(2):
        server = forks.start(
            "fairseq_cli/web/serve.py", folder, "--store", f"s={store}", "--writable", "--port", "0", "--k", "4"
        )
        client = httpx.Client(base_url=_address_of(server), trust_env=False, timeout=30)
        for number, ids in known.items():
            assert client.get(f"/stores/s/documents/{number}").json()["tokens"] == ids[1:]
        killer = threading.Timer(0.25 + 0.1 * round_, os.kill, (server.pid, signal.SIGKILL))
        killer.start()
        try:
            while True:
                ids = texts[len(sent)]
                sent.append(ids)
                number = client.post("/stores/s/documents", json={"documents": [ids]}).json()["documents"][0]
                known[number] = ids
        except httpx.TransportError:
            pass
        client.close()
        assert server.wait(20) == -signal.SIGKILL
    assert len(known) >= 3
    opened = Datastore.open(f"{store}.served")
    opened.verify()
    whole = {tuple(ids[1:]) for ids in sent}
    total = int(opened.documents.runs_R3[:, 1].max()) + 1
    for number in range(4, total):
        rows = opened.documents.rows_of([number], len(opened))
        assert tuple(opened.values.take(rows).tolist()) in whole
    assert len(known) <= total - 4 <= len(sent)
    metadata = json.loads((tmp_path / "s.served" / "datastore.json").read_text())
    assert metadata["complete"] is True


def _address_of(server):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        server.poll()
        for line in (server._folder / "out").read_text().splitlines():
            if line.startswith("listening on "):
                return line.removeprefix("listening on ")
        assert server.returncode is None, server.err
        time.sleep(0.02)
    raise AssertionError("it does not listen")

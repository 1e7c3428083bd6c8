"""What the server rejects, with which status and reason, and what it says about itself."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import served_models
from served_models import prompt, serving

from fairseq.hf.decoding.rows import RowDecoder
from fairseq.hf.decoding.sampling import TokenSampler

PROMPT = {"prompt": [5, 6, 7]}
MESSAGE = {"role": "user", "content": "w5"}
WRONG = [
    # path, body, status, param, part of the reason
    ("completions", PROMPT | {"foo": 1}, 400, "foo", "unknown field 'foo'"),
    ("completions", PROMPT | {"knn": {"lamda": 1}}, 400, "knn.lamda", "unknown field 'knn.lamda'"),
    ("completions", {}, 400, "prompt", "is missing"),
    ("completions", {"prompt": ""}, 400, "prompt", "holds no tokens"),
    ("completions", {"prompt": {"a": 1}}, 400, "prompt", "must be a text or a list of token ids"),
    ("completions", {"prompt": [5, 48]}, 400, "prompt", "holds 48, not a token id from 0 to 47"),
    ("completions", {"prompt": [5, -1]}, 400, "prompt", "holds -1"),
    ("completions", {"prompt": [5, True]}, 400, "prompt", "holds True"),
    ("completions", {"prompt": ["w5"] * 65}, 400, "prompt", "at most 64 prompts, got 65"),
    ("completions", {"prompt": "w5 " * 400_000}, 400, "prompt", "at most 1048576 characters"),
    ("completions", {"prompt": [5] * 60, "max_tokens": 5}, 400, "max_tokens", "60 tokens and max_tokens is 5"),
    ("completions", {"prompt": [5] * 64}, 400, "prompt", "together more than the 64"),
    ("completions", PROMPT | {"max_tokens": 0}, 400, "max_tokens", "must be from 1 to 64, got 0"),
    ("completions", PROMPT | {"max_tokens": 1.5}, 400, "max_tokens", "must be a whole number, got 1.5"),
    ("completions", PROMPT | {"max_tokens": 10**30}, 400, "max_tokens", "must be from 1 to 64"),
    ("completions", PROMPT | {"temperature": -1}, 400, "temperature", "must be from 0.0 to 2.0, got -1"),
    ("completions", PROMPT | {"temperature": 1e-9}, 400, "temperature", "must be 0 or at least 0.0001, got 1e-09"),
    ("completions", PROMPT | {"temperature": 10**400}, 400, "temperature", "must be from 0.0 to 2.0, got 1000"),
    ("completions", PROMPT | {"temperature": "hot"}, 400, "temperature", "must be a number, got 'hot'"),
    ("completions", PROMPT | {"top_p": 0}, 400, "top_p", "must be above 0.0, got 0"),
    ("completions", PROMPT | {"n": 17}, 400, "n", "must be from 1 to 16, got 17"),
    ("completions", PROMPT | {"logprobs": 21}, 400, "logprobs", "must be from 0 to 20, got 21"),
    ("completions", PROMPT | {"stop": [""]}, 400, "stop", "none of them empty"),
    ("completions", PROMPT | {"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ("completions", PROMPT | {"presence_penalty": 1}, 400, "presence_penalty", "not supported; leave it out"),
    ("completions", PROMPT | {"best_of": 3}, 400, "best_of", "not supported"),
    ("completions", PROMPT | {"echo": 1}, 400, "echo", "must be true or false, got 1"),
    ("completions", PROMPT | {"stream_options": {}}, 400, "stream_options", "needs stream: true"),
    ("completions", PROMPT | {"model": "gpt-9"}, 404, "model", "'gpt-9' is not served here; 'tiny' is"),
    ("completions", PROMPT | {"knn": {"store": "c"}}, 404, "knn.store", "there is no store 'c'; the stores: a, b"),
    ("completions", PROMPT | {"knn": {"k": 10**6}}, 400, "knn.k", "must be from 1 to 176, got 1000000"),
    ("completions", PROMPT | {"knn": {"lambda": 1.5}}, 400, "knn.lambda", "must be from 0.0 to 1.0"),
    ("completions", PROMPT | {"knn": {"temperature": 0}}, 400, "knn.temperature", "must be from 0.0001"),
    ("completions", PROMPT | {"knn": True}, 400, "knn", "must be an object, got True"),
    ("completions", PROMPT | {"knn": False, "neighbors": 1}, 400, "neighbors", "needs a store"),
    ("completions", PROMPT | {"neighbors": 101}, 400, "neighbors", "must be from 0 to 100"),
    ("completions", PROMPT | {"extended_mind": {"topk": 1}}, 400, "extended_mind", "start the server with"),
    ("../search", {"keys": [1e39] * 16}, 400, "keys", "a list of numbers up to 1e+15"),
    ("../search", {"keys": [10**400] * 16}, 400, "keys", "a list of numbers up to 1e+15"),
    ("chat/completions", {}, 400, "messages", "is missing"),
    ("chat/completions", {"messages": []}, 400, "messages", "must be a list with items"),
    ("chat/completions", {"messages": ["w5"]}, 400, "messages[0]", "must be an object with role and content"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0]", "a role and a content of text"),
    ("chat/completions", {"messages": [MESSAGE], "tools": [{}]}, 400, "tools", "not supported"),
    ("chat/completions", {"messages": [MESSAGE], "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs: true"),
    ("chat/completions", {"messages": [MESSAGE], "prompt": "w5"}, 400, "prompt", "unknown field"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "reason"), WRONG)
def test_a_request_that_cannot_be_answered_says_why(served, path, body, status, param, reason):
    error = served.post(f"/v1/{path}", status, **body)["error"]
    assert reason in error["message"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


NO_OBJECTS = [b"", b"{", b"[1]", b'{"prompt": NaN}', b"[" * 100_000, b"\xff"]
HALF_CHARACTERS = [
    b'{"\\ud800": 1}',
    b'{"prompt": "\\uDC00 w5"}',
    '{"prompt": "\\ud800"}'.encode("utf-16"),
    b'{"\xed\xa0\x80": 1}',
]


@pytest.mark.parametrize("text", NO_OBJECTS + HALF_CHARACTERS)
def test_a_body_that_is_no_object(served, text):
    answer = served.client.post("/v1/completions", content=text)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_infinite_keys_are_rejected(served):
    """JSON's 1e999 is read as an infinity, which no row is near."""
    answer = served.client.post("/search", content=b'{"keys": [1e999' + b", 0" * 15 + b"]}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "keys"


@pytest.mark.parametrize("number", ["9" * 21, "9" * 5000, "x", "-1", "\u0663"])
def test_a_document_that_has_no_number(served, number):
    answer = served.client.get(f"/stores/a/documents/{number}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "document_not_found"


def test_only_clients_that_went_away_count_as_cancelled(served, monkeypatch):
    before = served.figure("fairseq_cancelled_total")
    with monkeypatch.context() as patch:
        patch.setattr(RowDecoder, "read", lambda *given, **named: 1 / 0)
        served.complete([5, 6], 500, max_tokens=3)
    assert served.figure("fairseq_cancelled_total") == before


def test_lookups_of_prompts_are_counted(served):
    before = served.figure("fairseq_lookups_total")
    served.complete(prompt(9, seed=1), max_tokens=3, echo=True, logprobs=0)
    assert served.figure("fairseq_lookups_total") == before + 9 + 3


def test_a_body_that_ends_too_early_is_no_fault_of_ours(served, caplog):
    with socket.create_connection(("127.0.0.1", served.address.port)) as client:
        client.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    deadline = time.monotonic() + 10
    while 'path="/search",status="499"' not in served.client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not caplog.records


def test_paths_methods_and_sizes(served):
    client = served.client
    missing, wrong = client.get("/v1/engines"), client.get("/v1/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["message"] == "there is no GET /v1/engines"
    large = client.post("/v1/completions", content=b"x" * (5 << 20))
    assert large.status_code == 413
    assert "at most 4194304 bytes" in large.json()["error"]["message"]
    strange = client.post("/v1/completions", json=PROMPT, headers={"host": "example.com"})
    assert strange.status_code == 421
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/other").status_code == 404


def test_fields_of_openai_that_change_nothing_are_taken(served):
    idle = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"}}
    idle |= {"stop": None, "seed": None, "logprobs": None, "best_of": 1, "suffix": None, "knn": None}
    plain = served.tokens([5, 6, 7], max_tokens=3)
    assert served.tokens([5, 6, 7], max_tokens=3, **idle) == plain


def test_a_full_queue_is_429_with_a_time(llama, llama_stores):
    """One sequence at a time, two that wait; what was taken is answered."""
    with serving(llama, store=(f"a={llama_stores}/a",), k=8, max_batch=1, max_waiting=2) as served:
        statuses, headers = [], []

        def ask():
            body = {"prompt": [5, 6], "max_tokens": 60}
            answer = served.client.post("/v1/completions", json=body)
            statuses.append(answer.status_code)
            headers.append(answer.headers.get("retry-after"))

        clients = [threading.Thread(target=ask) for _ in range(12)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        assert all(int(seconds) >= 1 for seconds, status in zip(headers, statuses) if status == 429)
        assert served.figure("fairseq_rejected_total") == statuses.count(429)
        assert served.tokens([5, 6], max_tokens=1)
        many = served.post("/v1/completions", 400, prompt=[[5], [6], [7]])["error"]
        assert "at most 2 prompts" in many["message"]


def test_a_request_that_fails_leaves_the_others_alone(served, monkeypatch):
    """One of several sequences in a batch; then a forward call, which they share; then the thread itself."""
    wanted = served.tokens([5, 6, 7], max_tokens=40)
    own = TokenSampler.choose

    def choose(sampler, scores, ids):
        if ids[0] == 9 and len(ids) > 6:
            raise RuntimeError("a fault of the sampler")
        return own(sampler, scores, ids)

    monkeypatch.setattr(TokenSampler, "choose", choose)
    with ThreadPoolExecutor(4) as clients:
        good = [clients.submit(served.tokens, [5, 6, 7], max_tokens=40) for _ in range(3)]
        bad = served.complete([9, 6, 7], 500, max_tokens=40, temperature=1.0)["error"]
        assert [each.result() for each in good] == [wanted] * 3
    assert (bad["type"], bad["message"]) == ("server_error", "the request failed: RuntimeError: a fault of the sampler")
    with monkeypatch.context() as patch:
        patch.setattr(RowDecoder, "step", lambda *given, **named: 1 / 0)
        assert "ZeroDivisionError" in served.complete([5, 6], 500, max_tokens=3)["error"]["message"]
    assert served.tokens([5, 6, 7], max_tokens=40) == wanted


def test_health_says_when_nothing_is_answered_any_more(llama, monkeypatch):
    with serving(llama) as served:
        assert served.client.get("/health").status_code == 200
        monkeypatch.setattr(served.server.engine, "_admit", lambda: 1 / 0)
        assert served.complete([5], 503, max_tokens=1)["error"]["code"] == "stopping"
        served.server.engine.stop()
        assert served.client.get("/health").json() == {"status": "stopped"}
        assert served.complete([5], 503, max_tokens=1)["error"]["code"] == "stopping"


def test_a_stop_lets_the_queue_drain(llama):
    """Requests that wait when the server is asked to stop are answered; their number was in the figures."""
    answers = []
    with serving(llama, max_batch=1) as served:
        ask = lambda: answers.append(served.tokens([5, 6, 7], max_tokens=40))  # noqa: E731
        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 10
        while served.server.engine.num_waiting < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        served.stop()
        for client in clients:
            client.join()
    assert len(answers) == 4
    assert len({tuple(answer) for answer in answers}) == 1


def test_a_model_without_a_tokenizer(llama, llama_stores, caplog):
    """Token ids in, token ids out, and one line about it; text is rejected."""
    with serving(llama, store=(f"a={llama_stores}/a",), k=8) as served:
        choice = served.complete([5, 6, 7], max_tokens=3, neighbors=1, logprobs=1)["choices"][0]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [str(token) for token in choice["token_ids"]]
        assert all(type(token) is int for each in choice["neighbors"] for token in each[0]["before"])
        error = served.post("/v1/completions", 400, prompt="w5")["error"]["message"]
        assert "has no tokenizer; give prompt as a list of token ids" in error
        assert "needs a tokenizer" in served.complete([5], 400, stop="w6")["error"]["message"]
        chat = served.post("/v1/chat/completions", 400, messages=[MESSAGE])["error"]
        assert chat["code"] == "no_chat_template"
    lines = [record.message for record in caplog.records if "no tokenizer" in record.message]
    assert len(lines) == 1


def test_other_addresses_need_the_token(llama):
    with serving(llama, host="0.0.0.0", token="s3cret") as served:
        client = served.client
        client.params = {}
        base = f"http://127.0.0.1:{served.address.port}"
        assert client.get(f"{base}/health").json() == {"status": "ok"}
        assert client.get(f"{base}/metrics").status_code == 401
        refused = client.post(f"{base}/v1/completions", json=PROMPT)
        assert refused.status_code == 401
        assert refused.json()["error"]["message"].startswith("the token is missing or wrong")
        right = {"authorization": "Bearer s3cret"}
        assert client.post(f"{base}/v1/completions", json=PROMPT, headers=right).status_code == 200


LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\\\n]*"(,[a-z]+="[^"\\\n]*")*\})? [0-9.e+-]+')


def test_figures_are_in_the_form_prometheus_reads(served):
    """By the rules of the format: a HELP and a TYPE before each figure, whose histogram's buckets rise to its count."""
    served.tokens([5, 6, 7], max_tokens=2)
    answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.endswith("\n")
    kinds, values = {}, {}
    for line in answer.text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            assert LINE.fullmatch(line), line
            values[line.rpartition(" ")[0]] = float(line.rpartition(" ")[2])
    for series in values:
        name = series.partition("{")[0]
        assert name in kinds or name.rpartition("_")[0] in kinds, series
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        buckets = [value for series, value in values.items() if series.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets)
        assert values[f'{name}_bucket{{le="+Inf"}}'] == values[f"{name}_count"] == buckets[-1]
    assert values["fairseq_generated_tokens_total"] >= 2
    assert values['fairseq_store_rows{store="a"}'] == 176


def test_the_command_finds_a_port_in_use_before_it_loads_anything(tmp_path, capsys):
    from fairseq_cli.web.serve import cli_main, main

    assert cli_main is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port} .* in use"):
            main([str(tmp_path / "nothing"), "--port", str(port)])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--store", "a=x", "a=y"], "has the name 'a' twice"),
        (["--store", "=x"], "must be NAME=PREFIX"),
        (["--retomaton"], "give --store NAME=PREFIX"),
        (["--writable"], "needs something to write"),
        (["--lmbda", "2"], "--lmbda must be at most 1.0, got 2.0"),
        (["--knn-temp", "0"], "--knn-temp must be above 0"),
        (["--k", "5000", "--store", "x"], "--k 5000 is above --max-k 4096"),
        (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(words, reason):
    from fairseq_cli.web.serve import main

    with pytest.raises(ValueError, match=re.escape(reason)):
        main(["model", *words])


def test_a_store_given_twice_is_two_stores():
    from fairseq.config import FlagParser, build
    from fairseq.serving.config import ModelServerConfig

    parser = FlagParser("fairseq-serve", "")
    parser.add_config(ModelServerConfig)
    config = build(ModelServerConfig, parser.parse(["m", "--store", "a=x", "--store", "dir/b", "c=dir/d"]))
    assert config.named_stores() == {"a": "x", "b": "dir/b", "c": "dir/d"}


def test_a_store_of_another_model_or_tokenizer_is_one_line(llama, llama_stores):
    other = served_models.tokenizer()
    other.add_tokens(["more"])
    with (
        pytest.raises(ValueError, match="was saved with another tokenizer"),
        serving(llama, other, store=(f"a={llama_stores}/a",)),
    ):
        pass
    import tiny_models

    wide = tiny_models.make("llama", hidden_size=32)
    with (
        pytest.raises(ValueError, match="has keys of width 16, the model makes keys of width 32"),
        serving(wide, store=(f"a={llama_stores}/a",)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="--k 500 is larger than datastore"),
        serving(llama, store=(f"a={llama_stores}/a",), k=500),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "writable", "reason"),
    [
        ("notes.txt", True, "is a text, and --writable keeps changes"),
        ("notes.txt", False, "the model has no tokenizer; name a saved memory"),
        ("none.safetensors", False, "none.safetensors"),
    ],
)
def test_memories_that_cannot_be_read(llama, tmp_path, name, writable, reason):
    (tmp_path / "notes.txt").write_text("w5", encoding="utf-8")
    options = {"extended_mind": str(tmp_path / name), "writable": writable}
    with pytest.raises((ValueError, OSError), match=re.escape(reason)), serving(llama, **options):
        pass
    with serving(llama) as served:
        assert served.tokens([5], max_tokens=1)


def test_prompts_of_one_token_and_the_longest(served, llama):
    from served_models import continuation

    ids = prompt(63, seed=1)
    assert served.tokens(ids, max_tokens=1, knn=False) == continuation(llama, ids, 1)
    assert len(served.tokens([5], max_tokens=63)) == 63

"""The queries behind the page: their answers, and what they reject."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from explorer_oracle import column, packed
from starlette.testclient import TestClient

from fairseq.explorer.app import LARGEST_BODY, make_app
from fairseq.explorer.export import as_html, export, read_page
from fairseq.explorer.packing import pack, unpack
from fairseq.explorer.schema import read_explanation
from fairseq.explorer.words import NumberWords
from fairseq.memory.datastore.delete import delete
from fairseq_cli.entry import run
from fairseq_cli.web import explore

pytestmark = pytest.mark.slow


@pytest.fixture
def explanation(explored, kept):
    return explored("saved", kept.path)


@pytest.fixture
def client(explanation):
    with TestClient(make_app(explanation), raise_server_exceptions=False) as client:
        yield client


def message(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


def test_the_page_trusts_its_own_script_and_style_alone(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert len(re.findall(r"'sha256-[\w+/=]{44}'", policy)) == 2
    assert "unsafe" not in policy
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", policy + read_page())
    assert " style=" not in read_page()
    assert not re.search(r" on\w+=", read_page().split("<script>")[0])
    assert "innerHTML" not in read_page()
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_ranges_are_parts_of_the_whole(client, explanation):
    whole = column(explanation, "mixed")
    answer = client.get("/api/tokens?first=10&stop=15").json()
    assert answer["first"] == 10
    assert len(answer["text"]) == 5
    np.testing.assert_array_equal(packed(answer["columns"]["mixed"]), whole[10:15])
    candidates = client.get("/api/candidates?first=10&stop=15").json()
    assert candidates["scores"]["shape"] == [5, 16]
    about = client.get("/api/about").json()
    assert about["num_tokens"] == about["num_ready"] == len(whole)
    assert not about["reads"]


def test_a_setting_is_combined_by_the_server(client, explanation):
    made = client.get("/api/combined?k=4&lmbda=0&temperature=3").json()
    np.testing.assert_array_equal(packed(made["mixed"]), column(explanation, "lm"))
    assert made["sums"]["mixed"] == made["sums"]["lm"]
    opened = client.get("/api/combined").json()
    np.testing.assert_array_equal(packed(opened["mixed"]), column(explanation, "mixed"))
    assert opened["setting"] == client.get("/api/about").json()["setting"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/tokens?first=5&stop=4", "tokens 5 to 4 are not within"),
        ("/api/tokens?first=-1", "tokens -1 to"),
        ("/api/tokens?first=x", "first is 'x', not a whole number"),
        ("/api/tokens?frist=1", "unknown parameter 'frist'; known: first, stop, text"),
        ("/api/details", "at is None, not a whole number"),
        ("/api/details?at=99999999", "token 99999999 is not within"),
        ("/api/combined?k=17&lmbda=0.1&temperature=1", r"k 17 is not in 1..16"),
        ("/api/combined?k=1&lmbda=1.1&temperature=1", r"lmbda 1.1 is not in \[0, 1\]"),
        ("/api/combined?k=1&lmbda=0.1&temperature=0", "temperature 0.0 is not positive"),
        ("/api/combined?k=1&lmbda=nan&temperature=1", "lmbda nan is not in"),
        ("/api/combined?k=1&lmbda=y&temperature=1", "lmbda is 'y', not a number"),
    ],
)
def test_wrong_queries_are_answered_with_the_reason(client, path, said):
    assert re.search(said, message(client.get(path), 400))


def test_wrong_requests(client):
    assert "Not Found" in message(client.get("/api/other"), 404)
    assert "Method Not Allowed" in message(client.post("/api/about"), 405)
    assert "no model is open" in message(client.post("/api/read", json={"text": "w1"}), 400)
    assert "send JSON" in message(client.post("/api/read", content="w1"), 415)
    json_ = {"content-type": "application/json"}
    assert "no JSON" in message(client.post("/api/read", content=b"{\xff", headers=json_), 400)
    assert "no JSON" in message(client.post("/api/read", content="[" * 30_000, headers=json_), 400)
    assert "no JSON object" in message(client.post("/api/read", content="[]", headers=json_), 400)
    assert "longer than" in message(client.post("/api/read", content=" " * (LARGEST_BODY + 1), headers=json_), 413)


def test_typed_text_is_checked(explored, explored_words, explored_store):
    explanation = explored(
        "eval-lm", *explored_words, "--knnlm", "--k", 4, "--lmbda", 0.1, "--dstore-filename", explored_store
    )
    with TestClient(make_app(explanation)) as client:

        def said(**body):
            return message(client.post("/api/read", json=body), 400)

        assert "unknown field 'txt'; known: text, tokens, only_next" in said(txt="w1")
        assert "give either text or tokens" in said(text="w1", tokens=[5])
        assert "text is not a string" in said(text=3)
        assert "not a list of whole numbers" in said(tokens=[True])
        assert "only_next is 1, not true or false" in said(text="w1", only_next=1)
        assert re.search(r"400 tokens are more than the \d+ that are read at once", said(tokens=[5] * 400))
        made = client.post("/api/read", json={"text": "w1 w3", "only_next": True}).json()
        assert len(made["ids"]) == 2


def test_an_export_is_complete_and_conforms_to_the_schema(explanation, tmp_path, kept):
    path = tmp_path / "e.json"
    explore.main(["saved", str(kept.path), "--export", str(path), "--export-first", "5", "--export-tokens", "40"])
    content = read_explanation(path)
    np.testing.assert_allclose(content["tokens"]["columns"]["mixed"], kept.logp[5:45], atol=1e-6)
    assert [details["at"] for details in content["details"]] == [*range(5, 45)]
    assert content["about"]["first"] == 5
    assert content["details"][3]["neighbors"][0]["text"] in content["details"][3]["words"].values()
    broken = json.loads(path.read_text())
    broken["about"]["rule"]["kind"] = "other"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"about\.rule\.kind.*export it again"):
        read_explanation(path)


@pytest.mark.parametrize("name", ["e.txt", "e"])
def test_an_export_is_of_a_known_kind(kept, name):
    with pytest.raises(ValueError, match=r"must end in \.html or \.json"):
        explore.main(["saved", str(kept.path), "--export", name])


def test_text_ends_no_script(explanation):
    content = export(explanation, slice(0, 2)).replace("w", "</script><script>alert(1)</script><!--")
    page = as_html(read_page(), content)
    assert page.count("<script") == read_page().count("<script")
    assert page.count("</script>") == read_page().count("</script>")
    assert 'http-equiv="Content-Security-Policy"' in page


def test_packed_arrays_come_back():
    for values, dtype in (([1.5, -np.inf, np.nan], "float32"), ([[1, -1]], "int32"), ([1, 0], "uint8")):
        np.testing.assert_array_equal(unpack(pack(values, dtype)), np.array(values, dtype))
    with pytest.raises(ValueError, match="has 8 bytes"):
        unpack(pack([1.0, 2.0], "float32") | {"shape": [3]})


def test_without_dictionary_and_store_numbers_are_shown_and_it_is_said_once(
    kept, tmp_path, explored_store, explored, caplog
):
    moved = tmp_path / "moved.retrieval"
    text = kept.path.read_bytes()
    # As after a move to another machine: both names, of equal length, are of places that are not here.
    for name in re.findall(rb'\\"(?:prefix|dictionary)\\": \\"([^"\\]+)\\"', text):
        text = text.replace(name, b"/gone" + b"x" * (len(name) - 5))
    moved.write_bytes(text)
    explanation = explored("saved", moved)
    assert isinstance(explanation.neighbors.words, NumberWords)
    assert len(explanation.about()["notes"]) == 2
    assert sum("no dictionary at" in record.getMessage() for record in caplog.records) == 1
    tokens = explanation.tokens(slice(0, 4))
    assert tokens["text"] == [str(number) for number in packed(tokens["columns"]["token"])]
    neighbor = explanation.details(0)["neighbors"][0]
    assert neighbor["before"] == []
    assert neighbor["row"] >= 0
    again = explored("saved", moved, "--dstore-filename", explored_store)
    assert len(again.about()["notes"]) == 1


def test_rows_that_were_deleted_since_are_marked(kept, tmp_path, explored_store, explored):
    prefix = tmp_path / explored_store.name
    for path in explored_store.parent.glob(f"{explored_store.name}*"):
        if path.suffix in (".json", ".npy"):
            shutil.copy(path, tmp_path / path.name)
    first = explored("saved", kept.path).details(0)["neighbors"][0]
    delete(prefix, rows=[first["row"]])
    shown = explored("saved", kept.path, "--dstore-filename", prefix).details(0)["neighbors"][0]
    assert shown["deleted"]
    assert (shown["row"], shown["text"]) == (first["row"], first["text"])


def test_mistakes_are_one_line_before_listening(kept, tmp_path, capsys, explored_words, explored_store):
    def line(*words):
        words += () if "--port" in words else ("--port", 0)
        with pytest.raises(SystemExit) as stopped:
            run("fairseq-explore", explore.main, [str(word) for word in words])
        assert stopped.value.code == 2
        (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fairseq-explore")]
        return said

    (tmp_path / "words.txt").write_text("a 1\n")
    assert "is not the one of" in line("saved", kept.path, "--dictionary", tmp_path / "words.txt")
    assert "no file" in line("saved", kept.path, "--dictionary", tmp_path / "none")
    assert "no datastore at" in line("saved", kept.path, "--dstore-filename", tmp_path / "none")
    assert "name a file of --save-retrieval" in line("saved")
    assert "is no file of --save-retrieval" in line(tmp_path / "words.txt")
    assert "the text has" in line("saved", kept.path, "--export", tmp_path / "e.json", "--export-first", 10**6)
    assert "--export-tokens must be at most 10000, got 20000" in line("saved", kept.path, "--export-tokens", 20_000)
    assert "none.retrieval'; name one of --save-retrieval" in line(tmp_path / "none.retrieval")
    assert "unknown kind of exploration 'svaed'" in line("svaed", kept.path)
    assert "no memory is named" in line("eval-lm", *explored_words)
    assert "give --model FOLDER" in line("hf")
    assert "give --memory FILE" in line("extended-mind", "--model", tmp_path, "--text", tmp_path / "words.txt")
    assert "--export FILE writes" in line("eval-lm", *explored_words, "--knnlm", "--eval-file", tmp_path / "e.json")
    saving = ("--knnlm", "--dstore-filename", explored_store, "--save-retrieval", tmp_path / "r")
    assert "fairseq-explore saved FILE" in line("eval-lm", *explored_words, *saving)
    from fairseq.web.config import AddressConfig
    from fairseq.web.running import Address

    with Address(AddressConfig(port=0)) as taken:
        assert f"--port {taken.port} of 127.0.0.1 is in use" in line("saved", kept.path, "--port", taken.port)


def test_kinds_are_listed(capsys):
    explore.main([])
    out = capsys.readouterr().out
    assert all(name in out for name in explore.KINDS)

"""examples/huggingface/domain_adaptation.py with a tiny GPT-2: what it leaves, and what it says about mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")


@pytest.mark.usefixtures("frozen_heap")
def test_a_datastore_of_the_domain_helps_and_a_report_is_left(
    examples: Path, tiny_gpt2: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import domain_adaptation

    words = ["--model", tiny_gpt2, "--out", tmp_path / "out", "--block_size", 32, "--k", 64, "--batch_size", 8]
    words += ["--train_file", corpus / "train.txt", "--valid_file", corpus / "valid.txt"]
    words += ["--test_file", corpus / "test.txt", "--num_clusters", 30, "--dtype", "float32"]
    domain_adaptation.main([str(word) for word in words])
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, knn, *automata = results["rows"]
    assert (plain["method"], knn["method"], len(automata)) == ("the model alone", "kNN-LM", 7)
    assert knn["perplexity"] < 0.8 * plain["perplexity"]
    assert all(row["perplexity"] < plain["perplexity"] for row in automata)
    shares = [row["saved_share"] for row in automata]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    assert shares[-1] == 0.0
    assert automata[-1]["perplexity"] <= knn["perplexity"]  # pointers and clusters add candidates to the neighbours
    assert len({row["num_tokens"] for row in results["rows"]}) == 1
    assert (tmp_path / "out" / "results.md").read_text() == told
    assert len(re.findall(r"^\|", told, re.MULTILINE)) == 2 + 9
    assert (tmp_path / "out" / "saved_searches.png").read_bytes()[1:4] == b"PNG"
    store = (tmp_path / "out" / "store-fp16_keys.npy").stat().st_mtime_ns
    domain_adaptation.main([*(str(word) for word in words), "--test_tokens", "200"])  # the store is not made again
    assert (tmp_path / "out" / "store-fp16_keys.npy").stat().st_mtime_ns == store
    with pytest.raises(ValueError, match=r"rows of another command, the text makes 96; give another --out"):
        domain_adaptation.main([*(str(word) for word in words), "--train_tokens", "100"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "a.txt"], "belong together; give all three or none"),
        (["--train_file", "a", "--valid_file", "b", "--test_file", "c"], "no such file: a"),
        (["--block_size", "1"], "--block_size must be at least 2, got 1"),
        (
            ["--model", ".", "--train_file", "HERE", "--valid_file", "HERE", "--test_file", "HERE"],
            "is no folder of a model",
        ),
    ],
)
def test_a_mistake_is_told(words: list[str], message: str, examples: Path, tmp_path: Path) -> None:
    import domain_adaptation

    (tmp_path / "here.txt").write_text("a b\n")
    replaced = [word.replace("HERE", str(tmp_path / "here.txt")) for word in words]
    with pytest.raises(ValueError, match=re.escape(message)):
        domain_adaptation.main([*replaced, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

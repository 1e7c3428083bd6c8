"""--prove of generate.py: honest steps sum to 1, TRIME's sum is found, and texts score the same when read whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fairseq.generation.next_token import NextToken
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_cli import eval_lm, generate

NAMES = ("mass", "causality", "order", "disjointness")


@pytest.fixture(scope="module")
def store(data_bin: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("prove") / "store")
    words = [
        "--path",
        str(trained / "checkpoint_best.pt"),
        "--sample-break-mode",
        "eos",
        "--max-tokens",
        "128",
        "--cpu",
    ]
    eval_lm.main([str(data_bin), *words, "--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", prefix])
    return prefix


@pytest.fixture
def proof(data_bin, trained, tmp_path):
    """Continue the first tokens of each line; the verdicts, and all figures of the proof."""

    def run(*more: str, subset: str = "test"):
        words = ["--path", str(trained / "checkpoint_best.pt"), "--task", "language_modeling", "--cpu", "--quiet"]
        words += ["--gen-subset", subset, "--results-path", str(tmp_path), "--beam", "2"]
        words += [] if "--score-reference" in more else ["--prefix-size", "2"]
        words += ["--sample-break-mode", "eos", "--max-tokens", "400", "--max-len-b", "12", *more]
        generate.main([str(data_bin), *words])
        found = json.loads((tmp_path / f"generate-{subset}.run.json").read_text())["figures"]["proof"]
        return [found[name]["passed"] for name in NAMES], found

    return run


@pytest.fixture
def knn(store):
    return ["--knnmt", "--dstore-filename", store, "--k", "4", "--knn-temp", "5"]


def test_honest_texts_pass(proof, knn):
    assert proof("--prove", "all", "--unkpen", "0.5")[0] == [True, True, None, None]
    verdicts, found = proof(*knn, "--lmbda", "0.4", "--prove", "12", "--temperature", "1.5")
    assert verdicts == [True] * 4
    assert found["num_positions"] == 12
    assert proof(*knn, "--knn-lambda-type", "trime", "--knn-sim-func", "dot", "--prove")[0][0]


def test_drawn_texts_are_those_of_the_seed_with_and_without_proofs(data_bin, trained, capsys):
    words = [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), "--task", "language_modeling", "--cpu"]
    words += ["--prefix-size", "2", "--sample-break-mode", "eos", "--max-tokens", "400", "--max-len-b", "12"]
    texts = []
    for more in ([], ["--prove", "5"], ["--seed", "2"]):
        generate.main([*words, "--sampling", "--beam", "1", *more])
        texts.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("H-")])
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) > 9


def test_trimes_sum_is_found(proof, knn):
    """It is 1 and the share that the memory has of both sums."""
    words = [*knn, "--knn-lambda-type", "trime", "--knn-sim-func", "dot", "--compat-trime-mass", "--prove", "10"]
    for more in ([], ["--score-reference"]):
        verdicts, found = proof(*words, *more)
        assert verdicts[:3] == [False, True, True]
        assert 1.01 < found["mass"]["mean"] <= 2.0
        assert found["mass"]["largest_difference"] < 1e-4


def test_references_in_the_store_are_found(proof, knn):
    verdicts, found = proof(*knn, "--lmbda", "0.4", "--prove", "2", "--score-reference", subset="train")
    assert verdicts == [True, True, True, False]
    assert found["disjointness"]["shares"]["8"] > 0.5
    assert found["disjointness"]["unit"] == "sentence"


def test_scores_of_another_distribution_are_found(proof, monkeypatch):
    honest = NextToken.logp
    monkeypatch.setattr(NextToken, "logp", lambda self, tokens_RT: honest(self, tokens_RT) + 0.01)
    verdicts, found = proof("--prove", "5")
    assert verdicts[0] is False
    assert found["mass"]["largest_difference"] == pytest.approx(0.01, abs=1e-4)


def test_a_decoder_that_reads_on_is_found(proof, monkeypatch):
    """A text's distribution, read whole, changes with the tokens after it."""
    honest = TransformerLanguageModel.forward

    def ahead(self, tokens_BT, *rest, **more):
        out = honest(self, tokens_BT, *rest, **more)
        return dataclasses.replace(out, hidden_BTD=out.hidden_BTD + 0.1 * out.hidden_BTD.mean(1, keepdim=True))

    monkeypatch.setattr(TransformerLanguageModel, "forward", ahead)
    assert proof("--prove", "5")[0][1] is False

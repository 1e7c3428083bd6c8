"""--prove finds planted faults and passes honest runs: a broken combiner, sources that see the future, a held text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from fairseq.evaluation.readers import CandidateReader
from fairseq.memory.combiners.interpolation import Interpolation
from fairseq.memory.sources.local import LocalMemory
from fairseq.memory.sources.rolling import RollingMemory
from fairseq.memory.types import Candidates
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_cli import eval_lm, eval_lm_trime

NAMES = ("mass", "causality", "order", "disjointness")
TEXT = ("--sample-break-mode", "none", "--tokens-per-sample", "32", "--max-tokens", "128", "--cpu")


@pytest.fixture(scope="module")
def model(data_bin: Path, trained: Path) -> list[str]:
    return [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *TEXT]


@pytest.fixture(scope="module")
def store(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a datastore of the training split."""
    prefix = str(tmp_path_factory.mktemp("prove") / "store")
    eval_lm.main([*model, "--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", prefix])
    return ["--dstore-filename", prefix, "--k", "16"]


@pytest.fixture
def prove(model, tmp_path, capsys):
    """Evaluate with --prove; each verdict, and the figures."""

    def run(*more: str, count: str = "30", subset: str = "test", trime: bool = False, fix: bool = True):
        path = tmp_path / "figures.json"
        words = [*model, "--gen-subset", subset, "--eval-file", str(path), *more, "--prove", count]
        if trime:
            eval_lm_trime.main([*words, *(["--fix-tail-pads"] if fix else [])])
        else:
            eval_lm.main(words)
        figures = json.loads(path.read_text())
        printed = capsys.readouterr().out
        assert [line.split()[2] for line in printed.splitlines() if line.startswith("proof of ")] == [
            f"{name}:" for name in NAMES
        ]
        return [figures["proof"][name]["passed"] for name in NAMES], figures

    return run


def test_honest_runs_pass(prove, store):
    knn = ["--knnlm", *store, "--lmbda", "0.3"]
    assert prove()[0] == [True, True, None, None]
    for more in (knn, [*knn, "--retomaton"], [*knn, "--retomaton", "--retomaton-carry"]):
        verdicts, figures = prove(*more)
        assert verdicts == [True] * 4
    proof = figures["proof"]
    assert proof["passed"]
    assert proof["mass"]["largest_deviation"] < 1e-5
    assert proof["num_positions"] == proof["causality"]["num_cuts"] == 30
    assert proof["disjointness"]["shares"]["13"] < 0.05


@pytest.mark.parametrize("long", [[], ["--use-long", "--mem-size", "48", "--dedup-memory"]])
def test_honest_runs_of_trime_pass_everywhere(prove, store, long):
    memories = [
        "--use-local",
        *long,
        "--context-window",
        "16",
        "--use-external",
        *store,
        "--use-interp",
        "--lmbda",
        ".2",
    ]
    verdicts, figures = prove(*memories, trime=True, count="all")
    assert verdicts == [True] * 4
    assert figures["proof"]["num_positions"] == figures["num_tokens"]
    assert figures["proof"]["order"]["num_checked"] == (2 if long else 1) * figures["num_tokens"]


def test_proofs_change_no_figure(prove, store):
    more = ["--knnlm", *store, "--lmbda", "0.3", "--retomaton", "--retomaton-carry"]
    assert prove(*more, count="1")[1]["loss_base2"] == prove(*more, count="8")[1]["loss_base2"]


def test_scores_out_of_a_file_are_checked_too(prove, store, tmp_path):
    more = ["--knnlm", *store, "--lmbda", "0.3", "--save-retrieval", str(tmp_path / "saved")]
    first, again = prove(*more)[1], prove(*more)[1]
    assert again["loss_base2"] == first["loss_base2"]
    assert again["proof"]["num_positions"] == first["proof"]["num_positions"] == 30
    verdicts, figures = prove(*more, count="all")
    assert verdicts == [True] * 4
    assert figures["proof"]["num_positions"] == figures["num_tokens"]


def test_a_sum_above_one_is_found(prove, store, monkeypatch):
    """As a public program had it: the memory's part is added, and the model's is not taken down."""
    honest = Interpolation.__call__

    def added(self, lm_logp_N, *rest, **more):
        memory_logp_N = honest(dataclasses.replace(self, weight=1.0), lm_logp_N, *rest, **more)
        return torch.logaddexp(lm_logp_N, memory_logp_N + math.log(self.weight))

    monkeypatch.setattr(Interpolation, "__call__", added)
    verdicts, figures = prove("--knnlm", *store, "--lmbda", "0.3")
    assert verdicts == [False, True, True, True]
    assert figures["proof"]["mass"]["mean"] == pytest.approx(1.3, abs=1e-4)
    assert not figures["proof"]["passed"]


def test_the_tails_that_trime_counts_alone_are_found(prove):
    """Without --fix-tail-pads the figure is TRIME's: one type of each tail has the probability of the tail."""
    assert prove("--use-local", trime=True)[0][0] is True
    verdicts, figures = prove("--use-local", trime=True, fix=False)
    assert verdicts[0] is False
    assert figures["proof"]["mass"]["mean"] > 1.01
    assert "--fix-tail-pads" in figures["proof"]["mass"]["words"]


def test_candidates_chosen_by_the_target_are_found(prove, store, monkeypatch):
    honest = CandidateReader._candidates

    def peeking(self, scored):
        found = honest(self, scored)
        values_NM = found.values_NM.clone()
        values_NM[:, 0] = scored.target_N
        return dataclasses.replace(found, values_NM=values_NM)

    monkeypatch.setattr(CandidateReader, "_candidates", peeking)
    verdicts, figures = prove("--knnlm", *store, "--lmbda", "0.3")
    assert verdicts == [True, False, True, True]
    assert "the combined distribution 0 positions before the change" in figures["proof"]["causality"]["words"]


def test_a_memory_of_the_text_that_sees_ahead_is_found(prove, monkeypatch):
    monkeypatch.setattr(LocalMemory, "_past", lambda self, scores_NT, _: torch.ones_like(scores_NT, dtype=torch.bool))
    assert prove("--use-local", trime=True)[0] == [True, False, False, None]


def test_a_memory_that_is_filled_before_it_is_read_is_found(prove, monkeypatch):
    honest = RollingMemory.lookup

    def eager(self, passage) -> Candidates:
        found = honest(self, passage)
        self.append(passage)
        ahead = honest(self, dataclasses.replace(passage, number=passage.number + 1))
        return ahead if ahead.scores_NM.shape[1] else found

    monkeypatch.setattr(RollingMemory, "lookup", eager)
    assert prove("--use-long", "--mem-size", "48", trime=True)[0] == [True, False, False, None]


def test_a_model_that_sees_ahead_is_found(prove, monkeypatch):
    honest = TransformerLanguageModel.forward

    def ahead(self, tokens_BT, *rest, **more):
        out = honest(self, tokens_BT, *rest, **more)
        hidden_BTD = out.hidden_BTD + 0.01 * out.hidden_BTD.mean(1, keepdim=True)
        return dataclasses.replace(out, hidden_BTD=hidden_BTD)

    monkeypatch.setattr(TransformerLanguageModel, "forward", ahead)
    verdicts, figures = prove()
    assert verdicts[1:] == [False, None, None]
    assert figures["proof"]["causality"]["largest"] > 1e-4


def test_a_store_that_holds_the_text_is_found(prove, store):
    verdicts, figures = prove("--knnlm", *store, "--lmbda", "0.3", subset="train", count="5")
    assert verdicts == [True, True, True, False]
    assert figures["proof"]["disjointness"]["shares"]["13"] == 1.0
    assert len(figures["proof"]["disjointness"]["duplicates"]) > 90

"""RetoMaton as a user runs it: a store, an index or none, clusters, and eval_lm.py --knnlm --retomaton."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, perplexity

pytestmark = pytest.mark.slow

EVAL = ("--cpu", "--gen-subset", "valid", "--max-tokens", "256", "--context-window", "16", "--softmax-batch", "64")
KNN = ("--knnlm", "--lmbda", "0.3", "--k", "32")


@pytest.fixture(scope="module")
def store(trained: Path, data_bin: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the datastore of the training text, with clusters beside it."""
    prefix = tmp_path_factory.mktemp("store") / "dstore"
    words = ("--cpu", "--gen-subset", "train", "--max-tokens", "128", "--context-window", "16", "--save-knnlm-dstore")
    command("eval_lm.py", data_bin, "--path", trained / "checkpoint_best.pt", *words, "--dstore-mmap", prefix)
    command("build_dstore.py", "--dstore_mmap", prefix, "--cluster_dstore", "--num_clusters", 60)
    return prefix


@pytest.fixture
def scored(trained: Path, data_bin: Path, command: Command, store: Path, tmp_path: Path):
    """Evaluate with more words; returns the log-probabilities and how many tokens were searched of how many."""

    def evaluate(*more: object) -> tuple[np.ndarray, int | None, int]:
        words = (
            *EVAL,
            *KNN,
            "--dstore-filename",
            store,
            "--scores-file",
            tmp_path / "s.npz",
            "--eval-file",
            tmp_path / "e",
        )
        out = command("eval_lm.py", data_bin, "--path", trained / "checkpoint_best.pt", *words, *more).stdout
        figures = json.loads((tmp_path / "e").read_text())
        told = re.search(r"^searched (\d+) of (\d+) tokens \(saved ([\d.]+)%\)$", out, re.MULTILINE)
        searched = figures.get("num_searched")
        assert (told is None) == (searched is None)
        if told:
            assert (int(told[1]), int(told[2])) == (searched, figures["num_tokens"])
            assert float(told[3]) == pytest.approx(100 * (1 - searched / figures["num_tokens"]), abs=0.01)
        assert perplexity(out) == pytest.approx(figures["perplexity"], abs=0.006)
        with np.load(tmp_path / "s.npz") as file:
            return file["logp"], searched, figures["num_tokens"]

    return evaluate


def test_without_pointers_it_is_knn_lm(scored) -> None:
    plain, searched, _ = scored()
    assert searched is None
    logp, searched, tokens = scored("--retomaton", "--no-pointer", "--retomaton-search", "needed")
    assert searched == tokens
    np.testing.assert_allclose(logp, plain, atol=1e-5)


def test_pointers_save_searches_and_clusters_save_more(scored, store: Path) -> None:
    logp, searched, tokens = scored("--retomaton", "--min-knns", 4)
    assert 0.05 * tokens < searched < 0.95 * tokens
    again = scored("--retomaton", "--min-knns", 4, "--retomaton-search", "needed", "--max-tokens", 64)
    np.testing.assert_allclose(again[0], logp, atol=1e-4)
    assert abs(again[1] - searched) <= 0.01 * tokens
    clusters = ("--clusters", f"{store}.clusters.npz")
    assert scored("--retomaton", "--min-knns", 4, *clusters)[1] < searched
    assert scored("--retomaton", "--min-knns", 4, "--retomaton-carry")[1] < searched
    assert scored("--retomaton", "--min-knns", 9999999)[1] == tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-knns", 3, "--knnlm"), "--min-knns belongs to --retomaton"),
        (("--retomaton",), "--retomaton is a way to find the neighbours of --knnlm"),
        (("--retomaton", "--knnlm", "--clusters", "nowhere.npz"), "--clusters: no file at 'nowhere.npz'"),
        (
            ("--retomaton", "--knnlm", "--no-pointer", "--clusters", "x"),
            "--no-pointer follows nothing that --clusters",
        ),
        (("--retomaton", "--knnlm", "--min-knns", 0), "--min-knns must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message: str, trained: Path, data_bin: Path, capsys) -> None:
    from fairseq_cli.entry import run
    from fairseq_cli.eval_lm import main

    with pytest.raises(SystemExit) as stopped:
        run("eval_lm.py", main, [str(data_bin), "--path", str(trained / "checkpoint_best.pt"), *map(str, words)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]

"""run_clm.py against per-token scores of the original program, where the folder with them is at hand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = os.environ.get("FAIRSEQ_GOLDEN")
pytestmark = pytest.mark.skipif(not ROOT, reason="FAIRSEQ_GOLDEN is not set")


@pytest.mark.parametrize(("kind", "figure"), [("base", 196.3216), ("knn", 192.599)])
def test_every_token_of_an_evaluation(kind: str, figure: float, clm: Callable[..., str], tmp_path: Path) -> None:
    folder = Path(str(ROOT)) / "hf"
    words = ["--model_name_or_path", folder / "gpt2-small-wt2", "--validation_file", folder / "data" / "valid.txt"]
    words += ["--do_eval", "--drop_group_tails", "--save_scores", tmp_path / "scores.npz"]
    words += ["--knn", "--dstore_dir", folder / "index", "--no_load_keys"] if kind == "knn" else []
    told = clm(*words)
    ours, theirs = np.load(tmp_path / "scores.npz"), np.load(folder / "scores" / f"{kind}_full.npz")
    assert ours["target"].tolist() == theirs["target"].tolist()
    apart = np.abs(ours["logprob"] - theirs["logprob"])
    # Of equally close keys, and of keys as close as their codes can tell, the k-th may be another one.
    assert np.quantile(apart, 0.999) < 1e-3
    assert apart.max() < (2e-2 if kind == "knn" else 1e-4)
    allowed = 0.01 if kind == "base" else 0.05
    assert np.exp(-ours["logprob"].mean(dtype=np.float64)) == pytest.approx(figure, abs=allowed)
    assert f"Perplexity: {figure:.2f}" in told
    assert re.search(r"scored 29695 of 29855 tokens", told)


@pytest.mark.parametrize(("min_knns", "figure", "share"), [(1, 159.31, 59.30), (16, 173.78, 36.19)])
def test_the_automaton_as_the_original_counts(
    min_knns: int, figure: float, share: float, clm: Callable[..., str], tmp_path: Path
) -> None:
    folder = Path(str(ROOT)) / "hf"
    told = clm(
        *("--model_name_or_path", folder / "gpt2-small-wt2", "--validation_file", folder / "data" / "valid.txt"),
        *("--do_eval", "--drop_group_tails", "--max_eval_samples", 64, "--save_scores", tmp_path / "scores.npz"),
        *("--retomaton", "--retomaton_compat", "--min-knns", min_knns, "--dstore_dir", folder / "index"),
        "--no_load_keys",
    )
    ours, theirs = np.load(tmp_path / "scores.npz"), np.load(folder / "scores" / f"reto_nocl_m{min_knns}.npz")
    assert ours["target"].tolist() == theirs["target"].tolist()
    assert np.exp(-ours["logprob"].mean(dtype=np.float64)) == pytest.approx(figure, abs=0.1)
    found = re.search(r"^saved ([0-9.]+)% of the searches$", told, re.MULTILINE)
    assert found
    assert float(found[1]) == pytest.approx(share, abs=0.2)

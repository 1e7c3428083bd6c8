"""Scored references whose neighbours are kept; a sweep of them equals separate runs of generate.py."""

import itertools
import json

import learned_pairs
import numpy as np
import pytest

from fairseq.memory.retrieval.file import Retrieval
from fairseq.memory.sources.external import ExternalMemory
from fairseq.tasks.translation import TranslationTask
from fairseq_cli import generate
from fairseq_cli.memory import knn_sweep


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The words of a command with a model that has learned a little, and its datastore of the training text."""
    folder = tmp_path_factory.mktemp("pairs")
    words = learned_pairs.make(folder, {"train": 90, "valid": 30, "test": 30})
    store = ["--knnmt", "--dstore-filename", str(folder / "store"), "--score-reference", "--k", "6"]
    return [*words, *store]


@pytest.fixture
def scored(words, tmp_path):
    """Score the references; returns lines and figures."""

    def call(*more):
        generate.main([*words, "--results-path", str(tmp_path / "scored"), *map(str, more)])
        lines = (tmp_path / "scored" / "generate-test.txt").read_text()
        return lines, json.loads((tmp_path / "scored" / "generate-test.run.json").read_text())["figures"]

    return call


@pytest.fixture
def swept(tmp_path, capsys):
    """Sweep a file; returns what was printed and the settings."""

    def call(*more):
        capsys.readouterr()
        knn_sweep.main([*map(str, more), "--out", str(tmp_path / "swept")])
        return capsys.readouterr().out, json.loads((tmp_path / "swept.json").read_text())["settings"]

    return call


def test_a_sweep_equals_separate_runs(scored, swept, tmp_path):
    kept = tmp_path / "kept"
    _, figures = scored("--lmbda", 0.3, "--knn-temp", 5, "--save-retrieval", kept)
    out, rows = swept(kept, "--k", "2,6", "--lmbda", "0,0.4", "--temperature", "1,20", "--explain", 2)
    grid = itertools.product((2, 6), (1, 20), (0, 0.4))
    assert [(row["k"], row["softmax_temp"], row["lmbda"]) for row in rows] == [*grid]
    for row in rows[1::2]:
        settings = ("--k", row["k"], "--lmbda", row["lmbda"], "--knn-temp", row["softmax_temp"])
        assert row["loss_base2"] == pytest.approx(scored(*settings)[1]["loss_base2"], abs=1e-6)
    assert rows[0]["loss_base2"] == rows[2]["loss_base2"] == rows[4]["loss_base2"], "without a share nothing matters"
    _, (row,) = swept(kept, "--lmbda", 0.3)
    assert row["loss_base2"] == pytest.approx(figures["loss_base2"], abs=1e-6)
    best = next(line for line in out.splitlines() if line.startswith("best")).split(": ", 1)[1].split(" (")[0]
    assert scored(*best.split())[1]["loss_base2"] == pytest.approx(min(row["loss_base2"] for row in rows), abs=1e-6)
    assert "gained most" in out
    assert json.loads((tmp_path / "kept.run.json").read_text())["figures"] == figures


def test_joint_normalisation_is_swept_over_its_temperature(scored, swept, tmp_path):
    joint = ("--faiss-metric-type", "ip", "--knn-lambda-type", "trime")
    scored(*joint, "--knn-temp", 2, "--save-retrieval", tmp_path / "kept")
    out, rows = swept(tmp_path / "kept", "--k", "3,6", "--temperature", "1,9", "--explain", 1)
    assert [(row["k"], row["softmax_temp"]) for row in rows] == [*itertools.product((3, 6), (1, 9))]
    for row in rows:
        settings = ("--k", row["k"], "--knn-temp", row["softmax_temp"])
        assert row["loss_base2"] == pytest.approx(scored(*joint, *settings)[1]["loss_base2"], abs=1e-6)
    best = min(rows, key=lambda row: row["loss_base2"])
    assert f"--knn-lambda-type trime --k {best['k']} --softmax-temp {best['softmax_temp']:g} (" in out
    assert (tmp_path / "swept.png").exists()
    with pytest.raises(ValueError, match="--lmbda: .*kept was saved by generate.py --knn-lambda-type trime, which"):
        swept(tmp_path / "kept", "--lmbda", 0.5)


def test_a_killed_command_goes_on_and_a_complete_one_searches_nothing(scored, tmp_path, monkeypatch):
    settings = ("--lmbda", 0.3, "--knn-temp", 5, "--save-retrieval")
    lines, figures = scored(*settings, tmp_path / "whole")
    search, calls = ExternalMemory.neighbors, []

    def dies(memory, query_ND):
        calls.append(len(query_ND))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(memory, query_ND)

    monkeypatch.setattr(ExternalMemory, "neighbors", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(*settings, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert scored(*settings, tmp_path / "cut")[0] == lines
    whole, cut = (Retrieval.open(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == figures["tokens"] == sum(calls) - calls[2]
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(cut.arrays[name], array)
    monkeypatch.setattr(ExternalMemory, "neighbors", None)
    again, said = scored(*settings, tmp_path / "cut")
    assert (again, said["perplexity"]) == (lines, figures["perplexity"])
    with pytest.raises(ValueError, match=r"holds neighbours of another evaluation \(there and here: k 6 and 5\)"):
        scored(*settings, tmp_path / "cut", "--k", 5)


def test_shards_are_swept_together(scored, swept, words, tmp_path):
    scored("--save-retrieval", tmp_path / "kept")
    files = [tmp_path / f"kept.{shard}" for shard in range(2)]
    for shard, file in enumerate(files):
        more = ["--num-shards", "2", "--shard-id", str(shard), "--save-retrieval", str(file), "--quiet"]
        generate.main([*words, *more])
    losses = [[row["loss_base2"] for row in swept(*named)[1]] for named in (files, [tmp_path / "kept"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert swept(tmp_path / "kept", "--report", ",".join(map(str, files)))[1]
    cut = ["--truncate-source", "--max-source-positions", "5", "--save-retrieval", str(tmp_path / "kept")]
    with pytest.raises(ValueError, match="holds neighbours of another evaluation .*sizes"):
        generate.main([*words, *cut])
    with pytest.raises(ValueError, match="shard 98 of 99 holds no batch; lower --num-shards"):
        generate.main([*words, "--num-shards", "99", "--shard-id", "98", "--save-retrieval", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--score-reference"}, "keeps the neighbours .*: give --score-reference too"),
        ({"--knnmt"}, "--dstore-filename .* is read with --knnmt|give --knnmt too"),
        (("--knn-lambda-type", "distance"), "--knn-lambda-type distance has a share of its own for each token"),
        (("--compat-trime-mass", "--knn-lambda-type", "trime", "--faiss-metric-type", "ip"), "leave out --compat"),
        (("--save-retrieval", "/"), "--save-retrieval / is a folder"),
        (("--indexfile", "nothing"), r"no index at 'nothing' \(nor nothing.l2\)"),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(words, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(TranslationTask, "load_model", None)
    kept = [word for word in words if not (isinstance(change, set) and word in change)]
    more = [] if isinstance(change, set) else list(change)
    with pytest.raises(ValueError, match=message):
        generate.main([*kept, "--save-retrieval", str(tmp_path / "kept"), *more])

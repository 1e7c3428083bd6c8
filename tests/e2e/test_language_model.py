"""The main job as a user runs it: preprocess, train, evaluate, save a datastore, index it, evaluate with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, Command, perplexity
from loss_curves import recording, require_same_curve

pytestmark = [
    pytest.mark.slow,
]

EVAL = ("--cpu", "--gen-subset", "valid", "--max-tokens", "64", "--context-window", "16", "--softmax-batch", "64")


@pytest.fixture(scope="module")
def store(trained: Path, data_bin: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the datastore of the training text."""
    prefix = tmp_path_factory.mktemp("store") / "dstore"
    words = ("--cpu", "--gen-subset", "train", "--max-tokens", "128", "--context-window", "16")
    saving = ("--save-knnlm-dstore", "--dstore-mmap", prefix, "--knn-keytype", "last_ffn_input")
    command("eval_lm.py", data_bin, "--path", trained / "checkpoint_best.pt", *words, *saving)
    return prefix


def evaluate(command: Command, data_bin: Path, trained: Path, *more: object) -> str:
    return command("eval_lm.py", data_bin, "--path", trained / "checkpoint_best.pt", *EVAL, *more).stdout


def scores(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_training_leaves_plain_checkpoints_and_a_manifest(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint1.pt", "checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt", "train.run.json"} <= names
    assert torch.load(trained / "checkpoint_best.pt", weights_only=True)
    manifest = json.loads((trained / "train.run.json").read_text())
    assert manifest["figures"]["num_updates"] > 10
    assert manifest["figures"]["best"] < np.log2(80)


def test_the_report_has_the_two_lines_scripts_parse(trained: Path, data_bin: Path, command: Command) -> None:
    lines = evaluate(command, data_bin, trained).splitlines()
    assert lines[0].startswith("Evaluated ")
    assert lines[0].endswith(" tokens/s)")
    assert 2 < perplexity(lines[1]) < 60  # 74 types
    assert lines[2].startswith("scored ")


def test_perplexity_is_that_of_the_scores(trained: Path, data_bin: Path, command: Command, tmp_path: Path) -> None:
    out = evaluate(command, data_bin, trained, "--results-path", tmp_path)
    found = scores(tmp_path / "scores-valid.npz")
    figures = json.loads((tmp_path / "eval_lm-valid.json").read_text())
    assert figures["perplexity"] == pytest.approx(float(np.exp(-found["logp"].mean())))
    assert perplexity(out) == pytest.approx(figures["perplexity"], abs=0.006)
    assert sum(row["num_tokens"] for row in figures["buckets"]) == figures["num_tokens"] == len(found["logp"])
    assert json.loads((tmp_path / "eval_lm-valid.json.run.json").read_text())["figures"]["perplexity"]


def test_shards_together_are_the_whole(trained: Path, data_bin: Path, command: Command, tmp_path: Path) -> None:
    evaluate(command, data_bin, trained, "--scores-file", tmp_path / "all.npz")
    parts = []
    for shard in range(2):
        words = ("--num-shards", 2, "--shard-id", shard, "--scores-file", tmp_path / f"{shard}.npz")
        evaluate(command, data_bin, trained, *words)
        parts.append(scores(tmp_path / f"{shard}.npz"))
    whole = scores(tmp_path / "all.npz")
    np.testing.assert_array_equal(np.concatenate([part["target"] for part in parts]), whole["target"])
    np.testing.assert_allclose(np.concatenate([part["logp"] for part in parts]), whole["logp"], atol=1e-5)


def test_batch_size_changes_nothing(trained: Path, data_bin: Path, command: Command, tmp_path: Path) -> None:
    evaluate(command, data_bin, trained, "--scores-file", tmp_path / "a.npz", "--max-sentences", 1)
    evaluate(command, data_bin, trained, "--scores-file", tmp_path / "b.npz", "--max-tokens", 512)
    np.testing.assert_allclose(scores(tmp_path / "a.npz")["logp"], scores(tmp_path / "b.npz")["logp"], atol=1e-5)


def test_the_store_holds_every_position_with_full_context(store: Path, data_bin: Path) -> None:
    rows = json.loads(Path(f"{store}.json").read_text())["rows"]
    values = np.fromfile(f"{store}_vals.npy", dtype=np.int64)
    text = np.fromfile(data_bin / "train.bin", dtype=np.uint16)
    assert rows == len(text) - 16
    np.testing.assert_array_equal(values, text[16:])


def test_knn_lowers_perplexity_and_weight_zero_changes_nothing(
    trained: Path, data_bin: Path, command: Command, store: Path, tmp_path: Path
) -> None:
    index = tmp_path / "knn.index"
    sizes = ("--ncentroids", 8, "--code_size", 4, "--num_keys_to_add_at_a_time", 1000)
    command("build_dstore.py", "--dstore_mmap", store, "--faiss_index", index, *sizes)
    plain = evaluate(command, data_bin, trained, "--scores-file", tmp_path / "plain.npz")
    knn = ("--knnlm", "--dstore-filename", store, "--indexfile", index, "--k", 32, "--probe", 8)
    zero = ("--lmbda", 0, "--scores-file", tmp_path / "zero.npz")
    evaluate(command, data_bin, trained, *knn, *zero)
    np.testing.assert_array_equal(scores(tmp_path / "plain.npz")["logp"], scores(tmp_path / "zero.npz")["logp"])
    mixed = evaluate(command, data_bin, trained, *knn, "--lmbda", 0.3, "--softmax-temp", 3)
    assert perplexity(mixed) < perplexity(plain)


def test_knn_without_an_index_searches_exactly(
    trained: Path, data_bin: Path, command: Command, store: Path, tmp_path: Path
) -> None:
    """Oracle: brute force in NumPy over the stored keys, with the formula of arXiv 1911.00172, sec. 2."""
    knn = ("--knnlm", "--dstore-filename", store, "--k", 8, "--lmbda", 0.4, "--softmax-temp", 2)
    evaluate(command, data_bin, trained, *knn, "--scores-file", tmp_path / "knn.npz")
    evaluate(command, data_bin, trained, "--scores-file", tmp_path / "plain.npz")
    queries = tmp_path / "queries"
    saving = ("--save-knnlm-dstore", "--dstore-mmap", queries)
    evaluate(command, data_bin, trained, *saving)  # drops the first context window
    query = np.fromfile(f"{queries}_keys.npy", dtype=np.float32).reshape(-1, 16).astype(np.float64)
    keys = np.fromfile(f"{store}_keys.npy", dtype=np.float32).reshape(-1, 16).astype(np.float64)
    values = np.fromfile(f"{store}_vals.npy", dtype=np.int64)
    plain, knn_scores = scores(tmp_path / "plain.npz"), scores(tmp_path / "knn.npz")
    distance = ((query[:, None] - keys[None]) ** 2).sum(-1)
    nearest = np.argsort(distance, axis=1)[:, :8]
    weight = np.exp(-np.take_along_axis(distance, nearest, 1) / 2)
    holds = values[nearest] == plain["target"][16:, None]
    p_knn = (weight * holds).sum(1) / weight.sum(1)
    wanted = np.log(0.6 * np.exp(plain["logp"][16:]) + 0.4 * p_knn)
    np.testing.assert_allclose(knn_scores["logp"][16:], wanted, atol=1e-4)


def test_two_processes_train_the_same_model_as_two_batches_per_update(
    data_bin: Path, command: Command, tmp_path: Path
) -> None:
    words = (data_bin, "--max-update", "20", *TINY_MODEL, "--disable-validation", "--no-epoch-checkpoints")
    for name, more in (("one", "--update-freq"), ("two", "--distributed-world-size")):
        command("train.py", *words, *recording(tmp_path / name), "--save-dir", tmp_path / name, more, "2")
    require_same_curve(tmp_path / "one", tmp_path / "two")
    one, two = (torch.load(tmp_path / n / "checkpoint_last.pt", weights_only=True)["model"] for n in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--path", "nowhere.pt"), "no checkpoint at 'nowhere.pt'"),
        (("--lmbda", "1.3", "--knnlm"), "--lmbda 1.3 is not in [0, 1]"),
        (("--softmax-temp", "0", "--knnlm"), "--softmax-temp must be at least 1e-06, got 0.0"),
        (("--context-windw", "3"), "did you mean '--context-window'"),
        (("--gen-subset", "tset"), "no split 'tset'"),
        (("--context-window", "400"), "leaves nothing"),
        (("--knnlm", "--dstore-filename", "nowhere"), "nowhere"),
        (("--model-overrides", "{'decoder_layerz': 3}"), "decoder_layerz"),
    ],
)
def test_mistakes_are_told_in_one_line(
    trained: Path, data_bin: Path, command: Command, words: tuple[str, ...], told: str
) -> None:
    base = ("--path", trained / "checkpoint_best.pt", "--cpu", "--gen-subset", "valid", "--max-tokens", "64")
    done = command("eval_lm.py", data_bin, *base, *words, expect=2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0] == done.stderr.splitlines()[-1]

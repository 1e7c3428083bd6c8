"""Averages of checkpoints against NumPy's means, and which files of a folder are averaged."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint_utils import Checkpoint, load_checkpoint, save_checkpoint
from fairseq_cli import average_checkpoints

CONFIG = {"task": {"name": "language_modeling"}, "model": {"arch": "transformer_lm"}}


def write(path, seed, **more):
    values = {"a": torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 2))).half(), "n": torch.tensor([seed])}
    save_checkpoint(str(path), Checkpoint(config=CONFIG, model=values, **more))
    return values["a"].double().numpy()


def averaged(tmp_path, *words):
    average_checkpoints.main([*map(str, words), "--output", str(tmp_path / "out.pt")])
    return load_checkpoint(str(tmp_path / "out.pt"))


def test_the_mean_of_named_files(tmp_path):
    arrays = [write(tmp_path / f"{seed}.pt", seed, progress={"num_updates": 3}) for seed in (1, 2, 5)]
    found = averaged(tmp_path, "--inputs", *(tmp_path / f"{seed}.pt" for seed in (1, 2, 5)))
    assert found.model["a"].dtype is torch.float16
    np.testing.assert_array_equal(found.model["a"].numpy(), np.mean(arrays, axis=0).astype(np.float16))
    assert found.model["n"].tolist() == [2]  # 8 / 3, rounded down
    assert (found.config, found.progress) == (CONFIG, None)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (("--num-epoch-checkpoints", 2), (3, 10)),
        (("--num-epoch-checkpoints", 2, "--checkpoint-upper-bound", 9), (2, 3)),
        (("--num-update-checkpoints", 1), (40,)),
        (("--num-best-checkpoints", 1), (7,)),
    ],
)
def test_the_last_or_best_of_a_folder(tmp_path, words, numbers):
    folder = tmp_path / "run"
    folder.mkdir()
    names = {2: "checkpoint2.pt", 3: "checkpoint3.pt", 10: "checkpoint10.pt", 30: "checkpoint_1_30.pt"}
    names |= {40: "checkpoint_1_40.pt", 7: "checkpoint.best_loss_3.1000.pt", 8: "checkpoint.best_loss_3.2000.pt"}
    arrays = {seed: write(folder / name, seed) for seed, name in names.items()}
    expected = np.mean([arrays[seed] for seed in numbers], axis=0).astype(np.float16)
    np.testing.assert_array_equal(averaged(tmp_path, "--inputs", folder, *words).model["a"].numpy(), expected)


def test_the_moving_average_of_a_checkpoint_of_fairseq(tmp_path):
    content = {
        "args": argparse.Namespace(task="language_modeling", arch="transformer_lm"),
        "model": {"module.w": torch.zeros(2)},
        "extra_state": {"ema": {"w": torch.ones(2)}},
    }
    torch.save(content, tmp_path / "f.pt")
    assert averaged(tmp_path, "--inputs", tmp_path / "f.pt", "--ema").model["w"].tolist() == [1.0, 1.0]


def test_mistakes(tmp_path):
    write(tmp_path / "a.pt", 1)
    save_checkpoint(str(tmp_path / "b.pt"), Checkpoint(config=CONFIG, model={"b": torch.ones(1)}))
    for words, message in (
        ((), "give --inputs CHECKPOINT"),
        (("--inputs", tmp_path / "a.pt", tmp_path / "b.pt"), "differ in the weight a"),
        (("--inputs", tmp_path, "--num-epoch-checkpoints", 2), "holds 0 checkpoints of the kind"),
        (("--inputs", tmp_path / "a.pt", "--ema"), "holds no moving average; train with --store-ema"),
        (("--inputs", tmp_path, "--num-epoch-checkpoints", 2, "--num-best-checkpoints", 1), "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            averaged(tmp_path, *words)


def test_the_script_runs_from_any_folder(tmp_path):
    script = Path(__file__).parents[2] / "scripts/average_checkpoints.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "give --inputs" in done.stderr) == (2, True)

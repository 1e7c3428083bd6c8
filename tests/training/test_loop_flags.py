"""Flags of fairseq 0.12 about validation, saving and accumulation, each by what a short run does."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint
from fairseq.models.config import TransformerLMConfig
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.optim.configs import EmaConfig
from fairseq.optim.ema import WeightAverage
from fairseq_cli import train

BASE = (
    "--decoder-layers 1 --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 --decoder-attention-heads 2 --optimizer sgd "
    "--lr 0.1 --tokens-per-sample 16 --max-sentences 40 --cpu --no-progress-bar --log-format simple --seed 3"
).split()


def run(data: Path, save_dir: Path, *words: object) -> dict[str, Any]:
    """Train; returns the progress of the last checkpoint."""
    train.main([str(data), "--save-dir", str(save_dir), *BASE, *map(str, words)])
    return load_checkpoint(str(save_dir / "checkpoint_last.pt")).progress or {}


@pytest.fixture
def two_valid(data_bin: Path, tmp_path: Path) -> Path:
    """The data with test as a second validation split, valid1."""
    folder = tmp_path / "data"
    shutil.copytree(data_bin, folder)
    for end in (".bin", ".idx"):
        shutil.copyfile(folder / f"test{end}", folder / f"valid1{end}")
    return folder


def test_numbered_validation_splits_are_named_combined_or_ignored(two_valid, tmp_path, caplog):
    caplog.set_level("INFO")
    run(two_valid, tmp_path / "a", "--max-update", 1)
    assert "validation does not read valid1" in caplog.text
    caplog.clear()
    run(two_valid, tmp_path / "b", "--max-update", 1, "--ignore-unused-valid-subsets")
    assert "does not read" not in caplog.text
    run(two_valid, tmp_path / "c", "--max-update", 1, "--combine-valid-subsets")
    assert "does not read" not in caplog.text
    tokens = sum(os.path.getsize(two_valid / f"{name}.bin") // 2 for name in ("valid", "valid1"))
    assert f"valid, {two_valid}/valid1: {tokens} tokens" in caplog.text


def test_max_valid_steps_limits_the_batches(data_bin, tmp_path):
    whole = run(data_bin, tmp_path / "a", "--max-update", 1)["figures"]
    part = run(data_bin, tmp_path / "b", "--max-update", 1, "--max-valid-steps", 1, "--max-sentences-valid", 2)[
        "figures"
    ]
    assert (part["bsz"], part["wpb"] <= 32.0) == (2.0, True)
    assert part["loss"] != whole["loss"]


def test_skip_remainder_batch_drops_the_incomplete_update(data_bin, tmp_path):
    words = ("--max-epoch", 1, "--disable-validation", "--update-freq", 2, "--max-sentences")
    batches = run(data_bin, tmp_path / "a", *words[:3], "--max-sentences", 24)["num_updates"]
    assert run(data_bin, tmp_path / "b", *words, 24)["num_updates"] == -(-batches // 2)
    assert run(data_bin, tmp_path / "c", *words, 24, "--skip-remainder-batch")["num_updates"] == batches // 2
    with pytest.raises(ValueError, match="--skip-remainder-batch drops the whole epoch"):
        run(data_bin, tmp_path / "d", *words, 24, "--skip-remainder-batch", "--update-freq", batches + 1)


def test_a_save_interval_that_falls_on_an_epochs_end_saves(data_bin, tmp_path):
    updates = run(data_bin, tmp_path / "a", "--max-epoch", 1, "--disable-validation")["num_updates"]
    words = ("--max-epoch", 2, "--disable-validation", "--no-epoch-checkpoints", "--save-interval", 9)
    run(data_bin, tmp_path / "b", *words, "--save-interval-updates", updates)
    names = {name for name in os.listdir(tmp_path / "b") if name.endswith(".pt")}
    assert names == {f"checkpoint_1_{updates}.pt", f"checkpoint_2_{2 * updates}.pt", "checkpoint_last.pt"}


def test_accuracy_is_reported(data_bin, tmp_path):
    words = ("--criterion", "label_smoothed_cross_entropy", "--report-accuracy", "--max-update", 1)
    assert 0 <= run(data_bin, tmp_path / "a", *words)["figures"]["accuracy"] <= 100


def test_the_moving_average_follows_its_recursion_and_resumes(data_bin, tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    average = WeightAverage(EmaConfig(ema_decay=0.75, ema_start_update=2), layer)
    expected = None
    for update in range(1, 6):
        layer.weight.data.add_(update)
        average.update(layer, update)
        weight = layer.weight.detach().clone()
        expected = weight if update < 2 else 0.75 * expected + 0.25 * weight
        torch.testing.assert_close(average.weights["weight"], expected)
    words = ("--disable-validation", "--store-ema", "--ema-decay", 0.5)
    at_once = run(data_bin, tmp_path / "a", *words, "--max-update", 3)["ema"]
    run(data_bin, tmp_path / "b", *words, "--max-update", 2)
    resumed = run(data_bin, tmp_path / "b", *words, "--max-update", 3)["ema"]
    assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        config = TransformerLMConfig(
            decoder_embed_dim=8,
            decoder_ffn_embed_dim=8,
            decoder_layers=2,
            decoder_attention_heads=2,
            dropout=0.3,
            checkpoint_activations=on,
        )
        model = TransformerLanguageModel.build(config, 12, 1)
        torch.manual_seed(1)
        model(torch.tensor([[4, 5, 6, 7]])).hidden_BTD.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
